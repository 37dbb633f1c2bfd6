"""Translates a Hugging Face config.json to `ModelConfig`: plain Llamas and our own exports.

Reads both formats of transformers: `rope_theta` with `rope_scaling`, and `rope_parameters`. Options
that our models do not support are errors that name the option.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.config import ModelConfig
from mor_jax.config.old_names import SETTINGS, translated
from mor_jax.config.parsing import check, fail, parse
from mor_jax.convert.hf_rope import rope

CONFIG = "config.json"

# Our setting -> its name in config.json: those of any Llama, then those of our own exports.
SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
STRUCTURE = {
    "sharing": "sharing",
    "num_recursions": "num_recursions",
    "share_norms": "share_norms",
    "kv_mode": "kv_mode",
    "router": "router",
}
_ROUTER = "model.router."
# Router settings keep their original names in config.json, so that a refreshed modelling file can
# read older exports.
ROUTER = {
    new.removeprefix(_ROUTER): old.removeprefix(_ROUTER)
    for old, new in SETTINGS.items()
    if old.startswith(_ROUTER)
}
# Options for which our models support one value only: the first one or its synonyms.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "per_layer_config": (None, {}),
}
TIED = "tie_word_embeddings"
# Required in the config.json of an export, or transformers ignores the file beside it.
AUTO_MAP = {
    "AutoConfig": "modeling_mor.MoRConfig",
    "AutoModelForCausalLM": "modeling_mor.MoRForCausalLM",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_LENGTH = "max_position_embeddings"
_SIZES = ("num_key_value_heads", "head_dim", _LENGTH)
MAX_SIZES = {"num_hidden_layers": 10**5, "num_attention_heads": 10**5, "num_recursions": 10**4}
"""Larger values mean a damaged file: names of so many layers would fill the memory."""


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json in `directory`. Raises `ValueError` if it is missing or damaged."""
    path = directory / CONFIG
    fix = "Pass a directory with config.json beside the weights"
    check(path.is_file(), str(path), None, "is missing; it describes the model", fix)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        fail(str(path), None, f"is damaged ({error})", "Copy or download it again")
    kind = type(settings).__name__
    rule = "must be a JSON object of settings"
    check(isinstance(settings, dict), str(path), kind, rule, "Copy it again")
    return settings


def llama_config(hf: Mapping[str, Any], where: str = CONFIG, *, tied: bool) -> ModelConfig:
    """The vanilla model that a Llama configuration describes; float32, validated.

    tied: whether the tensors share embedding and unembedding.

    Raises:
        ValueError: another architecture, an unsupported option, or a missing size.
    """
    check_llama(hf, where)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads, head_dim = hf.get("num_key_value_heads"), hf.get("head_dim")
    theta, scaling = rope(hf, where)
    values = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": width,
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": width // heads if head_dim is None else head_dim,
        "intermediate_size": hf["intermediate_size"],
        "max_seq_len": hf.get("max_position_embeddings", 2048),
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
        ValueError: settings that are missing, unknown or inconsistent.
    """
    theta, scaling = rope(hf, where)
    names = SHAPE | STRUCTURE
    missing = [name for name in names.values() if hf.get(name) is None]
    check(
        not missing, where, missing, "lacks these settings of a mor_jax export", "Export it again"
    )
    for name in MAX_SIZES:
        check_size(hf, name, where)
    values = {ours: hf[name] for ours, name in names.items()}
    if isinstance(values["router"], Mapping):
        values["router"] = translated(values["router"], _ROUTER)
    fixed = {"rope_theta": theta, "tie_embeddings": tied, "dtype": "float32"}
    cfg = parse(ModelConfig, values | fixed, f"{where}: ")
    if cfg.router.kind != "none" and cfg.router.capacity_multiple is None:
        # Exports without the setting come from runs that did not round capacities.
        cfg = dataclasses.replace(cfg, router=dataclasses.replace(cfg.router, capacity_multiple=1))
    cfg = dataclasses.replace(cfg, rope_scaling=scaling)
    cfg.validate(where)
    return cfg


def check_llama(hf: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` unless `hf` is a Llama that computes what our vanilla models compute."""
    kind = hf.get("model_type", "llama")
    rule = "only the Llama architecture is supported"
    check(kind == "llama", f"{where}: model_type", kind, rule, "Use a model of type llama")
    classes = hf.get("architectures") or ["LlamaForCausalLM"]
    rule = "only language models with an output over the vocabulary are supported"
    valid = isinstance(classes, list) and "LlamaForCausalLM" in classes
    check(valid, f"{where}: architectures", classes, rule, "Use the LlamaForCausalLM checkpoint")
    missing = [name for name in _REQUIRED if hf.get(name) is None]
    check(not missing, where, missing, "lacks these sizes of the model", "Add them")
    for name in (*_REQUIRED, *_SIZES):
        check_size(hf, name, where)
    weights = hf.get("transformers_weights")
    rule = "names a weight file that this program does not look for"
    fix = "Remove the setting, and pass that file as --source"
    check(weights is None, f"{where}: transformers_weights", weights, rule, fix)
    for name, allowed in FIXED.items():
        value = hf.get(name, allowed[0])
        rule = f"our models support only {allowed[0]!r}"
        fix = "This model cannot be converted without changing what it computes"
        check(value in allowed, f"{where}: {name}", value, rule, fix)


def check_size(hf: Mapping[str, Any], name: str, where: str) -> None:
    """Raises `ValueError` unless the setting `name` is unset or an integer of a sensible size."""
    value = hf.get(name)
    lowest = 2 if name == _LENGTH else 1
    valid = value is None or (type(value) is int and value >= lowest)
    rule = f"must be a whole number of at least {lowest}"
    check(valid, f"{where}: {name}", value, rule, "Correct it, or copy the model's file again")
    highest = MAX_SIZES.get(name, 2**31 - 1)
    rule = f"is more than any model has ({highest})"
    check(value is None or value <= highest, f"{where}: {name}", value, rule, "Copy it again")


def is_tied(hf: Mapping[str, Any], where: str) -> bool:
    """Whether `hf` ties embedding and unembedding. Raises `ValueError` unless it is a boolean."""
    tied = hf.get(TIED, False)
    rule = "must be true or false"
    check(type(tied) is bool, f"{where}: {TIED}", tied, rule, "Write it without quotes")
    return tied


def remarks(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for the import's report about an accepted configuration."""
    notes = []
    if "model_type" not in hf and not hf.get("architectures"):
        notes.append("config.json has neither model_type nor architectures: read as a llama")
    code = hf.get("auto_map")
    if code and not (hf.get("model_type") == "mor" and code == AUTO_MAP):
        notes.append(f"config.json refers to custom code, which is ignored: auto_map={code}")
    return tuple(notes)
