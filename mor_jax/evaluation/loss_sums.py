"""Sums over each row of text: by the position of a token and by its depth.

Computed on the devices, a few numbers a row; the host adds rows up in double precision. Training
evaluates without them (`mor_jax.training.evaluator`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import TrainConfig
from mor_jax.distributed.collectives import shard_map_over_batch
from mor_jax.distributed.mesh import param_specs, spec_of
from mor_jax.models.params import forward, gather, logical_axes, logits_table
from mor_jax.models.routing.router import Route
from mor_jax.training.losses import token_losses
from mor_jax.training.train_step import shares_once
from mor_jax.types import IGNORE, Array, Batch, Bool, Float, Params

RowSums = dict[str, Float[Array, "b ..."]]


def position_starts(length: int) -> tuple[int, ...]:
    """First positions of the groups 0, 1, 2-3, 4-7, 8-15, ... of a row of `length` tokens."""
    return (0, *(2**i for i in range((length - 1).bit_length())))


def row_sums(
    cfg: TrainConfig,
    params: Params,
    batch: Batch,
    mode: str,
    thresholds: tuple[float, ...] | None = None,
) -> RowSums:
    """Sums over each row under routing `mode`, float32; losses in nats.

    correct [b]. ce_position, targets_position [b p]: for groups of positions that begin at
    `position_starts`; a position is that of the token which predicts. For routed models also
    ce_depth, targets_depth [b r+1]: by recursions that the predicting token went through, and
    depth_count [b r+1]: all tokens that are no padding. thresholds: as in `Route`.
    """
    route = Route(mode="causal" if mode == "causal" else "topk", thresholds=thresholds)

    def mine(params: Params, batch: Batch) -> RowSums:
        full = gather(cfg.model, params, shares_once(cfg))
        out = forward(cfg.model, full, batch, route)
        table = logits_table(cfg.model, full)
        ce, hit = token_losses(out.hidden, table, batch.targets, cfg.loss_chunk_size)
        here = batch.targets != IGNORE
        inside = jnp.asarray(_groups(cfg.seq_len))[None]
        sums = {
            "correct": jnp.sum(hit, axis=1, dtype=jnp.float32),
            "ce_position": _within(inside, ce),
            "targets_position": _within(inside, here),
        }
        if out.routing is not None:
            inside = jax.nn.one_hot(out.routing.depth, cfg.model.num_recursions + 1, dtype=bool)
            present = jnp.ones_like(here) if batch.segments is None else batch.segments > 0
            sums["ce_depth"] = _within(inside, ce)
            sums["targets_depth"] = _within(inside, here)
            sums["depth_count"] = _within(inside, present)
        return sums

    rows = spec_of(("batch",))
    return shard_map_over_batch(mine, (param_specs(logical_axes(cfg.model)), rows), rows)(
        params, batch
    )


def _groups(length: int) -> np.ndarray:
    """Which group of positions each is in, bool [length groups]."""
    starts = np.array(position_starts(length))
    group = np.searchsorted(starts, np.arange(length), side="right") - 1
    return group[:, None] == np.arange(len(starts))


def _within(inside: Bool[Array, "_ l n"], values: Array) -> Float[Array, "b n"]:
    # No matrix product: accelerators round its factors.
    return jnp.sum(jnp.where(inside, values[..., None].astype(jnp.float32), 0.0), axis=1)


def total(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches of sums of rows, end to end, as float64 [rows ...]."""
    return {
        name: np.concatenate([np.asarray(one[name], np.float64) for one in rows])
        for name in rows[0]
    }
