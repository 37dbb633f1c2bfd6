"""A Hugging Face config.json -> `ModelConfig`: plain Llama, and our own export.

Both ways in which releases of transformers write it are read: `rope_theta` with `rope_scaling`, and
`rope_parameters`. What our models do not compute is refused by its name.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.config import ModelConfig, RopeScaling, check, fail
from mor_jax.parsing import parse

CONFIG = "config.json"

# Our setting -> its name in config.json: of any Llama, and of our own export besides.
SHAPE = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
STRUCTURE = {
    "sharing": "sharing",
    "recursions": "num_recursions",
    "share_norms": "share_norms",
    "kv": "kv_mode",
    "router": "router",
}
# Options of which our models have one value only: the first, or another word for it.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_ROPES = ("default", "linear", "llama3")


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json in `directory`. Raises `ValueError` if it is missing or damaged."""
    path = directory / CONFIG
    fix = "Give a directory that holds config.json beside the weights"
    check(path.is_file(), str(path), None, "is missing; it says what model this is", fix)
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        fail(str(path), None, f"is damaged ({error})", "Copy or download it again")
    check(isinstance(found, dict), str(path), found, "is no configuration", "Copy it again")
    return found


def llama_config(hf: Mapping[str, Any], where: str = CONFIG, *, tied: bool) -> ModelConfig:
    """The plain model that a Llama configuration describes; float32, validated.

    tied: whether the tensors share embedding and unembedding.

    Raises:
        ValueError: another architecture, an option that our models do not have, or a size that is
            missing.
    """
    check_llama(hf, where)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    theta, scaling = rope(hf, where)
    values = {
        "vocab_size": hf["vocab_size"],
        "width": width,
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or width // heads,
        "mlp_width": hf["intermediate_size"],
        "max_length": hf.get("max_position_embeddings", 2048),
        "rope_theta": theta,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "init_std": hf.get("initializer_range", 0.02),
        "tie_embeddings": tied,
        "dtype": "float32",
    }
    cfg = dataclasses.replace(parse(ModelConfig, values, f"{where}: "), rope_scaling=scaling)
    cfg.validate(where)
    return cfg


def mor_config(hf: Mapping[str, Any], where: str = CONFIG, *, tied: bool) -> ModelConfig:
    """The model that the config.json of one of our own exports describes; float32, validated.

    Raises:
        ValueError: settings that are missing, unknown or do not fit together.
    """
    theta, scaling = rope(hf, where)
    names = SHAPE | STRUCTURE
    missing = [name for name in names.values() if hf.get(name) is None]
    check(not missing, where, missing, "lacks these settings of our export", "Export it again")
    values = {ours: hf[name] for ours, name in names.items()}
    fixed = {"rope_theta": theta, "tie_embeddings": tied, "dtype": "float32"}
    cfg = parse(ModelConfig, values | fixed, f"{where}: ")
    if cfg.router.kind != "none" and cfg.router.capacity_multiple is None:
        # Exports that do not say otherwise were made of runs that rounded nothing.
        cfg = dataclasses.replace(cfg, router=dataclasses.replace(cfg.router, capacity_multiple=1))
    cfg = dataclasses.replace(cfg, rope_scaling=scaling)
    cfg.validate(where)
    return cfg


def check_llama(hf: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` unless `hf` is a Llama that computes what our plain models compute."""
    kind = hf.get("model_type", "llama")
    rule = "only the Llama architecture is read"
    check(kind == "llama", f"{where}: model_type", kind, rule, "Take a model of type llama")
    classes = hf.get("architectures") or ["LlamaForCausalLM"]
    rule = "only a language model is read: the output over the vocabulary must be there"
    ok = "LlamaForCausalLM" in classes
    check(ok, f"{where}: architectures", classes, rule, "Take the LlamaForCausalLM checkpoint")
    missing = [name for name in _REQUIRED if hf.get(name) is None]
    check(not missing, where, missing, "lacks these sizes of the model", "Add them")
    for name in _REQUIRED:
        ok = type(hf[name]) is int and hf[name] > 0
        check(ok, f"{where}: {name}", hf[name], "must be a number of at least 1", "Copy it again")
    for name, allowed in FIXED.items():
        value = hf.get(name, allowed[0])
        rule = f"our models have {allowed[0]!r} and nothing else"
        fix = "This model cannot be converted without changing what it computes"
        check(value in allowed, f"{where}: {name}", value, rule, fix)


def rope(hf: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary embedding, as either generation of config.json tells them.

    Raises:
        ValueError: a kind of scaling that our models do not have, or two that contradict.
    """
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    for name, part in (("rope_scaling", old), ("rope_parameters", new)):
        ok = isinstance(part, Mapping)
        check(ok, f"{where}: {name}", part, "must be a group of settings", "Copy it again")
    told = dict(new) | dict(old)
    key = f"{where}: {'rope_scaling' if old else 'rope_parameters'}"
    thetas = {part["rope_theta"] for part in (hf, told) if part.get("rope_theta")}
    for theta in thetas:
        ok = type(theta) in (int, float)
        check(ok, f"{where}: rope_theta", theta, "must be a number", "Copy it again")
    check(len(thetas) < 2, f"{key}.rope_theta", sorted(thetas), "is told twice", "Keep one")
    part = told.get("partial_rotary_factor", 1.0)
    check(part == 1, f"{key}.partial_rotary_factor", part, "our models turn whole heads", "Use 1")
    theta = float(thetas.pop()) if thetas else 10000.0
    kind = told.get("rope_type", told.get("type", "default"))
    rule = f"only {', '.join(_ROPES)} are computed here"
    check(kind in _ROPES, f"{key}.rope_type", kind, rule, "This model cannot be converted exactly")
    if kind == "default":
        return theta, RopeScaling()
    needed = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }[kind]
    missing = [name for name in needed if told.get(name) is None]
    check(not missing, key, missing, f"lacks these numbers of {kind} scaling", "Add them")
    names = {"original_max_position_embeddings": "original_max_length"}
    numbers = {names.get(name, name): told[name] for name in needed}
    return theta, parse(RopeScaling, {"kind": kind} | numbers, f"{key}.")
