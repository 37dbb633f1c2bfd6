"""Checks that a run can fit into memory, before anything is compiled.

Counts a lower bound: the state, the tokens, and one residual stream of a micro-batch. So no run
that could train is rejected; one that passes may still run out of memory later.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check
from mor_jax.runtime.free_memory import free_bytes
from mor_jax.training.train_state import TrainState

_TOKEN = 8
"""Bytes of a token and its target, int32."""


def check_memory(cfg: TrainConfig, mesh: Mesh, state: TrainState, free: int | None = None) -> None:
    """Raises `ValueError`, naming the setting, for a state or a batch that cannot fit.

    state: shapes with shardings. free: bytes on each device, or on the host for CPUs; by default
    the current ones.
    """
    free = free_bytes() if free is None else free
    # CPU devices share the memory of the host.
    sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    needed = sum(map(_bytes, jax.tree.leaves(state))) * sharing
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    fix = "Use a smaller model, or raise mesh.fsdp if there are more devices"
    _fits("model", f"{parameters:,} parameters", needed, free, fix)
    width = cfg.model.hidden_size * (2 if cfg.model.dtype == "bfloat16" else 4)
    parts = mesh.size / sharing
    micro = cfg.batch_size / cfg.grad_accum_steps * width
    rows = (cfg.batch_size * _TOKEN + micro) * cfg.seq_len / parts
    fix = (
        "Lower it, or raise grad_accum_steps"
        if cfg.grad_accum_steps < cfg.batch_size
        else "Lower it"
    )
    _fits("batch_size", cfg.batch_size, rows, free, fix)


def _fits(setting: str, value: Any, needed: int | float, free: int, fix: str) -> None:
    rule = f"needs {needed / 1e9:,.1f} GB of memory or more, and {free / 1e9:,.1f} GB are free"
    check(needed <= free, setting, value, rule, fix)


def _bytes(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


__all__ = ["check_memory"]
