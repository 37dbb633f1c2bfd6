"""Hugging Face's LlamaForCausalLM with our weights, for benchmarks that stand beside PyTorch.

Needs requirements-convert.txt (torch, transformers).
"""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mor_jax.config import ModelConfig
from mor_jax.convert.state_dict import from_params
from mor_jax.types import Params


def llama(cfg: ModelConfig, params: Params) -> LlamaForCausalLM:
    """A plain model in float32 with scaled-dot-product attention, in training mode.

    Raises `ValueError` if a weight that PyTorch's model needs is not among `params`.
    """
    sizes = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.intermediate_size,
        max_position_embeddings=cfg.max_seq_len,
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(sizes).to(torch.float32).train()
    weights = from_params(cfg, params)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    if missing not in ([], ["lm_head.weight"]):
        raise ValueError(f"weights={missing!r}: PyTorch's model needs them. Check the name map")
    return model
