"""The PyTorch model beside ours: its configuration, its weights, and both on the same rows."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seeded import random_params

import mor_jax.convert.hf
from mor_jax.config import ModelConfig
from mor_jax.convert.lazy import flatten, held
from mor_jax.convert.names import mor_entries
from mor_jax.convert.views import as_tensors

MODELING = Path(mor_jax.convert.hf.__file__).with_name("modeling_mor.py")


@functools.cache
def modeling() -> Any:
    """The module of the export, loaded as a file of its own, as it stands in an export."""
    spec = importlib.util.spec_from_file_location("modeling_mor", MODELING)
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_mor"] = module
    spec.loader.exec_module(module)
    return module


def params_of(cfg: ModelConfig):
    """The weights of every test: with this seed, tokens of every variant take several depths."""
    return random_params(cfg, seed=2)


def hf_config(cfg: ModelConfig, **changes) -> Any:
    """The configuration of the export of `cfg`."""
    scaling, rope = cfg.rope_scaling, None
    if scaling.kind == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.kind == "llama3":
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    fields = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": rope,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_embeddings,
        "sharing": cfg.sharing,
        "num_recursions": cfg.recursions,
        "share_norms": cfg.share_norms,
        "kv_mode": cfg.kv,
        "router": dataclasses.asdict(cfg.router),
    }
    return modeling().MoRConfig(**(fields | changes))


def torch_state(cfg: ModelConfig, params) -> dict[str, torch.Tensor]:
    """Our parameters under the names of the export."""
    view = as_tensors(cfg, mor_entries(cfg), held(dict(flatten(params))))
    return {name: torch.from_numpy(np.array(view.read(name))) for name in view.specs}


def torch_model(cfg: ModelConfig, **changes) -> Any:
    """The PyTorch model with the weights of `params_of(cfg)`, in evaluation mode."""
    model = modeling().MoRForCausalLM(hf_config(cfg, **changes)).eval()
    missing, unexpected = model.load_state_dict(torch_state(cfg, params_of(cfg)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model
