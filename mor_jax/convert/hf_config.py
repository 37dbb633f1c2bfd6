"""A Hugging Face config.json -> `ModelConfig`: plain Llama, and our own export.

Both ways in which releases of transformers write it are read: `rope_theta` with `rope_scaling`, and
`rope_parameters`. What our models do not compute is refused by its name.
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

# Our setting -> its name in config.json: of any Llama, and of our own export besides.
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
# The settings of the router keep the names that exports had from the first: the modeling file
# beside an older export can be refreshed, and reads them.
ROUTER = {
    new.removeprefix(_ROUTER): old.removeprefix(_ROUTER)
    for old, new in SETTINGS.items()
    if old.startswith(_ROUTER)
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
    "is_causal": (True,),
    "per_layer_config": (None, {}),
}
TIED = "tie_word_embeddings"
# What config.json of an export has to say, or transformers does not read the file beside it.
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
MOST = {"num_hidden_layers": 10**5, "num_attention_heads": 10**5, "num_recursions": 10**4}
"""More is a damaged file: names of so many layers would fill the memory."""


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json in `directory`. Raises `ValueError` if it is missing or damaged."""
    path = directory / CONFIG
    fix = "Give a directory that holds config.json beside the weights"
    check(path.is_file(), str(path), None, "is missing; it says what model this is", fix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        fail(str(path), None, f"is damaged ({error})", "Copy or download it again")
    kind = type(found).__name__
    check(isinstance(found, dict), str(path), kind, "is no group of settings", "Copy it again")
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
        "hidden_size": width,
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if (told := hf.get("num_key_value_heads")) is None else told,
        "head_dim": width // heads if (told := hf.get("head_dim")) is None else told,
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
        ValueError: settings that are missing, unknown or do not fit together.
    """
    theta, scaling = rope(hf, where)
    names = SHAPE | STRUCTURE
    missing = [name for name in names.values() if hf.get(name) is None]
    check(not missing, where, missing, "lacks these settings of our export", "Export it again")
    for name in MOST:
        check_size(hf, name, where)
    values = {ours: hf[name] for ours, name in names.items()}
    if isinstance(values["router"], Mapping):
        values["router"] = translated(values["router"], _ROUTER)
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
    ok = isinstance(classes, list) and "LlamaForCausalLM" in classes
    check(ok, f"{where}: architectures", classes, rule, "Take the LlamaForCausalLM checkpoint")
    missing = [name for name in _REQUIRED if hf.get(name) is None]
    check(not missing, where, missing, "lacks these sizes of the model", "Add them")
    for name in (*_REQUIRED, *_SIZES):
        check_size(hf, name, where)
    other = hf.get("transformers_weights")
    rule = "names another file of weights than those that are looked for here"
    fix = "Take the setting out, and give that file as --source"
    check(other is None, f"{where}: transformers_weights", other, rule, fix)
    for name, allowed in FIXED.items():
        value = hf.get(name, allowed[0])
        rule = f"our models have {allowed[0]!r} and nothing else"
        fix = "This model cannot be converted without changing what it computes"
        check(value in allowed, f"{where}: {name}", value, rule, fix)


def check_size(hf: Mapping[str, Any], name: str, where: str) -> None:
    """Raises `ValueError` unless the setting `name` is silent or a number of a sensible size."""
    value = hf.get(name)
    least = 2 if name == _LENGTH else 1
    ok = value is None or (type(value) is int and value >= least)
    rule = f"must be a whole number of at least {least}"
    check(ok, f"{where}: {name}", value, rule, "Mend it, or take the model's file again")
    most = MOST.get(name, 2**31 - 1)
    rule = f"is more than any model has ({most})"
    check(value is None or value <= most, f"{where}: {name}", value, rule, "Copy it again")


def is_tied(hf: Mapping[str, Any], where: str) -> bool:
    """Whether `hf` says that embedding and unembedding are one. Raises `ValueError` if unclear."""
    told = hf.get(TIED, False)
    rule = "must be true or false"
    check(type(told) is bool, f"{where}: {TIED}", told, rule, "Write it without quotes")
    return told


def remarks(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """What an import should say of a configuration that it takes."""
    notes = []
    if "model_type" not in hf and not hf.get("architectures"):
        notes.append("config.json names neither model_type nor architectures: read as a llama")
    code = hf.get("auto_map")
    if code and not (hf.get("model_type") == "mor" and code == AUTO_MAP):
        notes.append(f"config.json names code of its own, which was not looked at: auto_map={code}")
    return tuple(notes)
