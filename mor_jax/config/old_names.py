"""Settings that had other names in earlier versions.

`SETTINGS` is the one table. `translated` and `translated_paths` are for what an earlier version
recorded: configurations of runs, checkpoints and studies. What a person gives under an old name
is refused, and `answer` is the sentence that says the new one.
"""

import re
from collections.abc import Mapping
from typing import Any

SETTINGS = {
    "length": "seq_len",
    "accumulate": "grad_accum_steps",
    "loss_chunk": "loss_chunk_size",
    "loss_z_coeff": "z_loss_coeff",
    "model.width": "model.hidden_size",
    "model.layers": "model.num_layers",
    "model.heads": "model.num_heads",
    "model.kv_heads": "model.num_kv_heads",
    "model.mlp_width": "model.intermediate_size",
    "model.max_length": "model.max_seq_len",
    "model.recursions": "model.num_recursions",
    "model.kv": "model.kv_mode",
    "model.rope_scaling.kind": "model.rope_scaling.rope_type",
    "model.rope_scaling.original_max_length": "model.rope_scaling.original_max_position_embeddings",
    "model.router.score": "model.router.activation",
    "model.router.z_coeff": "model.router.z_loss_coeff",
    "model.router.capacities": "model.router.capacity",
    "model.router.capacity_warmup_levels": "model.router.capacity_warmup_stages",
    "model.router.aux": "model.router.causal_routing",
    "model.router.aux_coeff": "model.router.aux_loss_coeff",
    "model.router.balancing": "model.router.load_balancing",
    "model.router.balance_coeff": "model.router.balance_loss_coeff",
    "model.router.bias_rate": "model.router.bias_update_rate",
    "optim.router_lr_ratio": "optim.aux_router_lr_ratio",
    "data.within_documents": "data.document_mask",
    "data.heldout_share": "data.validation_fraction",
    "data.workers": "data.num_workers",
    "eval.every": "eval.interval",
    "checkpoint.every": "checkpoint.interval",
    "checkpoint.keep": "checkpoint.max_to_keep",
    "checkpoint.keep_every": "checkpoint.keep_period",
    "checkpoint.also": "checkpoint.keep_steps",
    "log.every": "log.interval",
    "sharding.gather_shared": "sharding.all_gather_shared",
    "hosts.timeout": "hosts.heartbeat_timeout",
}
"""Dotted path in earlier versions -> dotted path now. The group of a setting is the same."""


def translated(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration, or the group of it at `prefix` (`model.`), under today's names.

    Raises `ValueError` if it has a setting under both names, as a file edited by hand may.
    """
    made: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        name = SETTINGS.get(path, path).removeprefix(prefix)
        if name != key and name in values:
            rule = f"is the old name of {prefix}{name}, which is given too"
            raise ValueError(f"{path}={value!r}: {rule}. Keep {prefix}{name} alone")
        made[name] = translated(value, f"{path}.") if isinstance(value, Mapping) else value
    return made


def translated_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same of settings by their dotted paths."""
    return {SETTINGS.get(path, path): value for path, value in values.items()}


def translated_command(text: str) -> str:
    """A command line with today's names in its `--config.NAME=VALUE`."""
    return re.sub(
        r"(--config\.)([\w.]+)(?==)",
        lambda found: found[1] + SETTINGS.get(found[2], found[2]),
        text,
    )


def answer(path: str) -> str | None:
    """`It is called seq_len now` for `length`; None unless `path` is an old name."""
    return f"It is called {SETTINGS[path]} now" if path in SETTINGS else None


def leaf_answer(leaf: str) -> str | None:
    """The same for the last part of a path, which is all that some errors tell."""
    found = {new for old, new in SETTINGS.items() if old.rpartition(".")[2] == leaf}
    return f"It is called {' or '.join(sorted(found))} now" if found else None


__all__ = [
    "SETTINGS",
    "answer",
    "leaf_answer",
    "translated",
    "translated_command",
    "translated_paths",
]
