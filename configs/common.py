"""Shared parts of the configurations: argument parsing, model sizes, routers, training recipes.

Every number is in a table. Nothing here computes one setting from another; derived values are
properties of the dataclasses (`mor_jax/config/train.py`).
"""

import difflib
from types import SimpleNamespace
from typing import Any, NoReturn

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# 135m to 1.7b: the paper's (SmolLM's) shapes. 3b and 7b: head dimension 128 and 8 key/value heads,
# divisible for tensor parallelism over 8 devices; 2 + 24 and 2 + 36 layers, so that 2, 3 and 4
# recursions have the full depth. debug: for CPUs, byte vocabulary.
SIZES = {
    "debug": {
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "intermediate_size": 352,
    },
    "135m": {
        "hidden_size": 576,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
    },
    "360m": {
        "hidden_size": 960,
        "num_heads": 15,
        "num_kv_heads": 5,
        "head_dim": 64,
        "intermediate_size": 2560,
    },
    "730m": {
        "hidden_size": 1536,
        "num_heads": 24,
        "num_kv_heads": 8,
        "head_dim": 64,
        "intermediate_size": 4096,
    },
    "1.7b": {
        "hidden_size": 2048,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
    },
    "3b": {
        "hidden_size": 3072,
        "num_heads": 24,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
    },
    "7b": {
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 11008,
    },
}

# Effective layers: of the vanilla model, then by number of recursions. "middle" schemes have 2 + a
# multiple of the recursions, the others a multiple: the largest one up to the vanilla depth, except
# 34 for 360m with 4 middle recursions, as in the paper.
LAYERS = {
    "debug": {"vanilla": 8, "middle": {2: 8, 3: 8, 4: 6}, "all": {2: 8, 3: 6, 4: 8}},
    "135m": {"vanilla": 30, "middle": {2: 30, 3: 29, 4: 30}, "all": {2: 30, 3: 30, 4: 28}},
    "360m": {"vanilla": 32, "middle": {2: 32, 3: 32, 4: 34}, "all": {2: 32, 3: 30, 4: 32}},
    "730m": {"vanilla": 26, "middle": {2: 26, 3: 26, 4: 26}, "all": {2: 26, 3: 24, 4: 24}},
    "1.7b": {"vanilla": 24, "middle": {2: 24, 3: 23, 4: 22}, "all": {2: 24, 3: 24, 4: 24}},
    "3b": {"vanilla": 26, "middle": {2: 26, 3: 26, 4: 26}, "all": {2: 26, 3: 24, 4: 24}},
    "7b": {"vanilla": 38, "middle": {2: 38, 3: 38, 4: 38}, "all": {2: 38, 3: 36, 4: 36}},
}

# Settings in which the routers' recipes differ; all others have the defaults of `_router`.
ROUTERS = {
    "none": {},
    "expert": {"kind": "expert", "activation": "sigmoid", "alpha": 0.1},
    "token": {"kind": "token", "activation": "softmax", "alpha": 1.0, "z_loss_coeff": 1e-5},
}

CHOICES = {
    "size": tuple(SIZES),
    "routing": ("expert", "token"),
    "kv": ("recursion", "shared", "shared_update"),
    "recursions": (2, 3, 4),
    "sharing": ("middle_cycle", "middle_sequence", "cycle", "sequence"),
}


def parse_arg(arg: str, **defaults: Any) -> SimpleNamespace:
    """Parses `key=value,key=value`, the part of `--config=FILE:ARG` after the colon.

    `defaults` are the keys of this configuration, all of them in `CHOICES`. Returns every key with
    its value. Raises `ValueError` on an unknown key or an invalid value.
    """
    values, chosen = dict(defaults), set()
    for item in filter(None, arg.split(",")):
        key, equals, text = item.partition("=")
        if key in chosen:
            raise ValueError(f"config argument {item!r}: {key} is set twice. Set it once")
        chosen.add(key)
        if key not in defaults:
            _fail(item, f"unknown key {key!r}", key, tuple(defaults))
        by_text = {str(choice): choice for choice in CHOICES[key]}
        if not equals or text not in by_text:
            _fail(item, f"unknown {key} {text!r}", text, tuple(by_text))
        values[key] = by_text[text]
    return SimpleNamespace(**values)


def _fail(item: str, problem: str, got: str, allowed: tuple[str, ...]) -> NoReturn:
    if not allowed:
        raise ValueError(f"config argument {item!r}: this configuration takes none. Remove it")
    if got.isdigit() and all(choice.isdigit() for choice in allowed):
        closest = min(allowed, key=lambda choice: abs(int(choice) - int(got)))
    else:
        closest = difflib.get_close_matches(got, allowed, n=1, cutoff=0.0)[0]
    rule = f"must be one of {', '.join(allowed)}"
    raise ValueError(f"config argument {item!r}: {problem}: {rule}. Did you mean {closest!r}?")


def _router(routing: str) -> ConfigDict:
    return ConfigDict(
        {
            "kind": "none",
            "arch": "linear",
            "activation": "sigmoid",
            "alpha": 0.1,
            "temperature": 1.0,
            "gating": "weighted",
            "z_loss_coeff": 0.0,
            "capacity": _optional(None),
            "capacity_warmup_steps": 0,
            "capacity_warmup_stages": 8,
            "causal_routing": "aux_loss",
            "aux_loss_coeff": 0.001,
            "load_balancing": "loss",
            "balance_loss_coeff": 0.1,
            "balance_warmup_steps": 0,
            "bias_update_rate": 0.001,
            "capacity_factor": _optional(None),
            "capacity_multiple": _optional(None),
            **ROUTERS[routing],
        }
    )


def _rope_scaling() -> ConfigDict:
    return ConfigDict(
        {
            "rope_type": "none",
            "factor": 1.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    )


def vanilla_model(size: str, routing: str = "none") -> ConfigDict:
    """The vanilla decoder of one of `SIZES`, with the settings of one of `ROUTERS`."""
    model = ConfigDict(
        {
            "vocab_size": 49152,
            "num_layers": LAYERS[size]["vanilla"],
            "max_seq_len": 2048,
            "rope_theta": 10000.0,
            "rope_scaling": _rope_scaling(),
            "norm_eps": 1e-5,
            "init_std": 0.02,
            "tie_embeddings": True,
            "sharing": "none",
            "num_recursions": 1,
            "share_norms": True,
            "kv_mode": "recursion",
            "router": _router(routing),
            "dtype": "bfloat16",
            "attention": "auto",
            "remat": "full",
        }
    )
    model.update(SIZES[size])
    if size == "debug":
        model.update({"vocab_size": 256, "init_std": 0.05, "dtype": "float32", "remat": "none"})
    return model


def recursive_model(size: str, recursions: int, sharing: str, kv: str, routing: str) -> ConfigDict:
    """A recursive decoder, routed unless `routing` is "none"."""
    model = vanilla_model(size, routing)
    scheme = "middle" if sharing.startswith("middle") else "all"
    model.num_layers = LAYERS[size][scheme][recursions]
    model.update({"sharing": sharing, "num_recursions": recursions, "kv_mode": kv})
    return model


def train(model: ConfigDict, size: str) -> ConfigDict:
    """The complete, locked configuration of a run of `model` with the recipe of its size."""
    cfg = _paper_run() if size != "debug" else _debug_run()
    cfg.model = model
    if size in ("1.7b", "3b", "7b"):
        # Parameters, optimiser state and batch are sharded over all devices.
        cfg.grad_accum_steps = 1
        cfg.mesh = ConfigDict(_mesh(data=1, fsdp=None))
    return cfg.lock()


def _paper_run() -> ConfigDict:
    """9,438 steps of 1024 sequences of 2048 tokens (20B): warm-up 5%, linear decay 20%."""
    return ConfigDict(
        {
            "steps": 9438,
            "batch_size": 1024,
            "seq_len": 2048,
            "grad_accum_steps": 8,
            "loss_chunk_size": _optional(128),
            "z_loss_coeff": 0.0,
            "seed": 0,
            "compilation_cache": True,
            "optim": _optim(lr=3e-3, warmup_steps=472, decay_steps=1888),
            "data": _data(("shards:data/fineweb-edu",), "data/fineweb-edu"),
            "eval": _evaluation(every=500, batches=16, batch_size=128),
            "checkpoint": _checkpoint(every=500),
            "log": _log(),
            "mesh": _mesh(data=None, fsdp=1),
            "sharding": {"all_gather_shared": _optional(None)},
            "hosts": {"heartbeat_timeout": 30},
            "profile": {"steps": _optional(None)},
        }
    )


def _debug_run() -> ConfigDict:
    """200 steps of 8 sequences of 256 bytes of the standard library, for CPUs."""
    return ConfigDict(
        {
            "steps": 200,
            "batch_size": 8,
            "seq_len": 256,
            "grad_accum_steps": 1,
            "loss_chunk_size": _optional(None),
            "z_loss_coeff": 0.0,
            "seed": 0,
            "compilation_cache": True,
            "optim": _optim(lr=6e-3, warmup_steps=20, decay_steps=60),
            "data": _data(("stdlib",), "bytes"),
            "eval": _evaluation(every=100, batches=8, batch_size=8),
            "checkpoint": _checkpoint(every=100),
            "log": _log(),
            "mesh": _mesh(data=None, fsdp=1),
            "sharding": {"all_gather_shared": _optional(None)},
            "hosts": {"heartbeat_timeout": 30},
            "profile": {"steps": _optional(None)},
        }
    )


def _optim(lr: float, warmup_steps: int, decay_steps: int) -> dict[str, Any]:
    return {
        "lr": lr,
        "schedule": "trapezoid",
        "warmup_steps": warmup_steps,
        "decay_steps": decay_steps,
        "final_lr_ratio": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "aux_router_lr_ratio": 10.0,
        "max_skipped_steps": 10,
    }


def _data(sources: tuple[str, ...], tokenizer: str) -> dict[str, Any]:
    return {
        "sources": sources,
        "weights": _optional(None),
        "text_key": "text",
        "tokenizer": tokenizer,
        "document_mask": False,
        "validation_fraction": 0.01,
        "shuffle": True,
        "seed": 0,
        "num_workers": 0,
        "prefetch": 2,
    }


def _optional(value: Any) -> Any:
    """A setting that can be None; `--config.eval.interval=None` and `=50` both work on it."""
    reference = placeholder(object)
    reference.set(value)
    return reference


def _evaluation(every: int, batches: int, batch_size: int) -> dict[str, Any]:
    return {
        "interval": _optional(every),
        "batches": batches,
        "batch_size": batch_size,
        "prompt": "def ",
        "completion_tokens": 160,
    }


def _checkpoint(every: int) -> dict[str, Any]:
    return {
        "interval": _optional(every),
        "max_to_keep": 2,
        "keep_period": _optional(None),
        "keep_steps": (),
    }


def _mesh(data: int | None, fsdp: int | None) -> dict[str, Any]:
    axes = {"slice": 1, "data": data, "fsdp": fsdp, "tensor": 1}
    return {name: _optional(size) for name, size in axes.items()}


def _log() -> dict[str, Any]:
    return {"interval": 10, "tensorboard": False, "wandb_project": _optional(None)}
