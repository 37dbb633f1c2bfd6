"""Settings that were renamed since earlier versions.

`SETTINGS` maps old names to new ones. `translated` and `translated_paths` convert recorded
configurations of runs, checkpoints and studies. Old names on a command line are rejected;
`rename_hint` is the sentence with the new name.
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
"""Old dotted path -> current dotted path. A setting never moves to another group."""


def translated(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration, or its group at `prefix` (`model.`), under the current names.

    Raises `ValueError` if it has a setting under both names, as a file edited by hand may.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        name = SETTINGS.get(path, path).removeprefix(prefix)
        if name != key and name in values:
            rule = f"is the old name of {prefix}{name}, which is set too"
            raise ValueError(f"{path}={value!r}: {rule}. Keep only {prefix}{name}")
        renamed[name] = translated(value, f"{path}.") if isinstance(value, Mapping) else value
    return renamed


def translated_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `translated`, for settings by their dotted paths."""
    return {SETTINGS.get(path, path): value for path, value in values.items()}


def translated_command(text: str) -> str:
    """A command line with the current names in its `--config.NAME=VALUE`."""
    return re.sub(
        r"(--config\.)([\w.]+)(?==)",
        lambda match: match[1] + SETTINGS.get(match[2], match[2]),
        text,
    )


def rename_hint(path: str) -> str | None:
    """`It is called seq_len now` for `length`; None unless `path` is an old name."""
    return f"It is called {SETTINGS[path]} now" if path in SETTINGS else None


def rename_hint_for_leaf(leaf: str) -> str | None:
    """As `rename_hint`, for the last part of a path, where an error names nothing else."""
    names = {new for old, new in SETTINGS.items() if old.rpartition(".")[2] == leaf}
    return f"It is called {' or '.join(sorted(names))} now" if names else None


__all__ = [
    "SETTINGS",
    "rename_hint",
    "rename_hint_for_leaf",
    "translated",
    "translated_command",
    "translated_paths",
]
