"""Imports a GGUF file of the architecture llama: dequantized parameters and the tokenizer.

llama.cpp rotates neighbouring channels of a head, Hugging Face rotates halves. GGUF files therefore
store the rows of query and key projections in another order, which is undone here.
"""

import math
import re

import numpy as np

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config import ModelConfig, RopeScaling
from mor_jax.config.parsing import check, fail
from mor_jax.convert.imported_model import ImportedModel, check_tokenizer, source_facts
from mor_jax.convert.names import EMBEDDING, HEAD, llama_entries
from mor_jax.convert.size_checks import check_layers
from mor_jax.convert.sources import Weights
from mor_jax.convert.sources.gguf_file import Metadata, open_gguf
from mor_jax.convert.sources.hub import locate_model
from mor_jax.convert.tokenizers.gguf import tokenizer_files
from mor_jax.convert.views import as_params

ROPE_FACTORS = "rope_freqs.weight"
_EPS = "llama.attention.layer_norm_rms_epsilon"
_ENDS = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata of llama variants that we do not support, with the value that has no effect.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "use_parallel_residual": False,
}


def import_gguf(path: str, tokenizer: bool = True) -> ImportedModel:
    """The model in the GGUF file `path`, or of the hub: `owner/name/FILE.gguf`.

    tokenizer: whether to read the tokenizer inside the file.

    Raises:
        ValueError: a damaged file, another architecture, settings that our models do not support,
            tensors that do not fit, or a tokenizer that cannot be rebuilt exactly.
    """
    file = locate_model(path)
    rule = "is a directory; a model is a single file"
    check(not file.is_dir(), "path", path, rule, "Pass the path of a .gguf file")
    raw, fields = open_gguf(file, "llama")
    cfg = _config(raw, fields)
    renamed = [_hf_name(name) for name in raw.specs]
    check_layers(f"{file}: llama.block_count", cfg.num_layers, cfg.num_layers, renamed)
    params = as_params(cfg, llama_entries(cfg), _renamed(raw, cfg))
    files = tokenizer_files(fields) if tokenizer else None
    if files is not None:
        check_tokenizer(files, cfg.vocab_size, str(file))
    notes: tuple[str, ...] = ()
    if any(spec.dtype not in ("F32", "F16", "BF16") for spec in raw.specs.values()):
        notes = (
            "the file is quantized: weights are the dequantized values, not the original ones",
        )
    weights = Weights(raw, "GGUF", notes)
    name = fields.get("general.name", str)
    return ImportedModel(cfg, params, files, source_facts(weights, architecture="llama", name=name))


def _config(raw: LazyArrays, fields: Metadata) -> ModelConfig:
    for key, neutral in _NEUTRAL.items():
        value = fields.get(f"llama.{key}", type(neutral), neutral)
        rule = f"our models support only {neutral}"
        fix = "This model cannot be converted exactly"
        check(value == neutral, f"{fields.where}: llama.{key}", value, rule, fix)
    width, heads = _number(fields, "embedding_length"), _number(fields, "attention.head_count")
    kv_heads = _number(fields, "attention.head_count_kv", heads)
    head_dim = _number(fields, "attention.key_length", width // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        value = _number(fields, key, head_dim)
        rule = f"must equal the head dimension, {head_dim}"
        fix = "This model cannot be converted"
        check(value == head_dim, f"{fields.where}: llama.{key}", value, rule, fix)
    embedding = raw.specs.get("token_embd.weight")
    check(embedding is not None, str(raw.where), None, "lacks token_embd.weight", "Copy it again")
    axes = len(embedding.shape)
    rule = "must have two axes, tokens and channels"
    check(axes == 2, f"{raw.where}: token_embd.weight", embedding.shape, rule, "Copy it again")
    theta = float(fields.get("llama.rope.freq_base", float, 10000.0))
    fields.check_present(_EPS)
    cfg = ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=width,
        num_layers=_number(fields, "block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_number(fields, "feed_forward_length"),
        max_seq_len=_number(fields, "context_length"),
        rope_theta=theta,
        rope_scaling=_scaling(raw, fields, head_dim, theta),
        norm_eps=_shortest_decimal(fields.get(_EPS, float)),
        tie_embeddings="output.weight" not in raw.specs,
        dtype="float32",
    )
    cfg.validate(fields.where)
    return cfg


def _number(fields: Metadata, key: str, default: int | None = None) -> int:
    """A size that is given once or for every layer.

    Raises `ValueError` if layers differ, or it is not a number of at least 1.
    """
    key = f"llama.{key}"
    if default is None:
        fields.check_present(key)
    values = fields.get_list(key, int) if fields.is_list(key) else [fields.get(key, int, default)]
    rule = "differs between layers; all our layers have the same sizes"
    fix = "This model cannot be converted"
    check(len(set(values)) == 1, f"{fields.where}: {key}", values[:5], rule, fix)
    rule = "must be a number of at least 1, and below 2**31"
    valid = 0 < values[0] < 2**31
    check(valid, f"{fields.where}: {key}", values[0], rule, "Copy or convert it again")
    return values[0]


def _shortest_decimal(value: float) -> float:
    # The file stores float32: 1e-05 reads as 9.99999974e-06, which is the same float32.
    return float(str(np.float32(value)))


def _scaling(raw: LazyArrays, fields: Metadata, head_dim: int, theta: float) -> RopeScaling:
    key = "llama.rope.scaling.type"
    kind = fields.get(key, str, "none")
    factor = fields.get("llama.rope.scale_linear", float, 1.0)
    factor = fields.get("llama.rope.scaling.factor", float, factor)
    fix = "This model cannot be converted exactly"
    valid = kind in ("none", "linear")
    rule = "only linear and Llama 3.1's scaling are supported"
    check(valid, f"{fields.where}: {key}", kind, rule, fix)
    if ROPE_FACTORS in raw.specs:
        check(kind == "none", f"{fields.where}: {key}", kind, f"{ROPE_FACTORS} scales too", fix)
        return _llama3(raw, fields, head_dim, theta)
    if factor == 1.0 or (kind == "none" and key in fields.fields):
        return RopeScaling()
    return RopeScaling(rope_type="linear", factor=_shortest_decimal(factor))


def _llama3(raw: LazyArrays, fields: Metadata, head_dim: int, theta: float) -> RopeScaling:
    """Llama 3.1's scaling, from the frequency divisors in the file, one per channel pair."""
    divisors = np.asarray(raw.read(ROPE_FACTORS), np.float64)
    rule = f"must have the shape ({head_dim // 2},)"
    check(divisors.shape == (head_dim // 2,), ROPE_FACTORS, divisors.shape, rule, "Copy it again")
    if np.all(divisors == 1.0):
        return RopeScaling()
    rotations = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    factor, low, high = _shortest_decimal(divisors.max()), 1.0, 4.0
    original = fields.get("llama.rope.scaling.original_context_length", int)
    # Few files give the length. Published models have 8192; others are powers of two as well.
    for length in [int(original)] if original else [8192, *(2**n for n in range(10, 21))]:
        unscaled = np.clip((rotations * length - low) / (high - low), 0.0, 1.0)
        if np.allclose(divisors, 1.0 / ((1.0 - unscaled) / factor + unscaled), rtol=1e-4):
            return RopeScaling(
                rope_type="llama3", factor=factor, original_max_position_embeddings=length
            )
    rule = "contains divisors of the rotary frequencies that are not those of Llama 3.1"
    fix = "This model cannot be converted exactly"
    fail(f"{fields.where}: {ROPE_FACTORS}", divisors.tolist(), rule, fix)


def _renamed(raw: LazyArrays, cfg: ModelConfig) -> LazyArrays:
    """Names and row order of Hugging Face. Unknown names are unchanged, for error messages."""
    names = {_hf_name(name): name for name in raw.specs if name != ROPE_FACTORS}
    rotated = {
        "self_attn.q_proj.weight": cfg.num_heads,
        "self_attn.k_proj.weight": cfg.num_kv_heads,
    }

    def read(name: str) -> np.ndarray:
        values = raw.read(names[name])
        heads = rotated.get(".".join(name.split(".")[-3:]))
        return values if heads is None else _to_halves(values, heads)

    return LazyArrays(raw.where, {hf: raw.specs[name] for hf, name in names.items()}, read)


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
    return _ENDS.get(name, name)


def _to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from channel pairs (0, 1), (2, 3), ... to halves: 0, 2, ..., then 1, 3, ..."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
