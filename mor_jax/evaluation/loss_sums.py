"""Loss sums of each sequence: by position of the tokens and by their depth.

Computed on the devices, a few numbers per sequence; the host adds them up in double precision.
Evaluation during training does not need them (`mor_jax.training.evaluator`).
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
    """First positions of the groups 0, 1, 2-3, 4-7, 8-15, ... of a sequence of `length` tokens."""
    return (0, *(2**i for i in range((length - 1).bit_length())))


def row_sums(
    cfg: TrainConfig,
    params: Params,
    batch: Batch,
    mode: str,
    thresholds: tuple[float, ...] | None = None,
) -> RowSums:
    """Sums over each sequence under routing `mode`, float32; losses in nats.

    correct [b]. ce_position, targets_position [b p]: for groups of positions that begin at
    `position_starts`; a position is that of the predicting token. For routed models also
    ce_depth, targets_depth [b r+1]: by recursions that the predicting token went through, and
    depth_count [b r+1]: all tokens but padding. thresholds: as in `Route`.
    """
    route = Route(mode="causal" if mode == "causal" else "topk", thresholds=thresholds)

    def mine(params: Params, batch: Batch) -> RowSums:
        full = gather(cfg.model, params, shares_once(cfg))
        out = forward(cfg.model, full, batch, route)
        table = logits_table(cfg.model, full)
        ce, hit = token_losses(out.hidden, table, batch.targets, cfg.loss_chunk_size)
        valid = batch.targets != IGNORE
        inside = jnp.asarray(_groups(cfg.seq_len))[None]
        sums = {
            "correct": jnp.sum(hit, axis=1, dtype=jnp.float32),
            "ce_position": _within(inside, ce),
            "targets_position": _within(inside, valid),
        }
        if out.routing is not None:
            inside = jax.nn.one_hot(out.routing.depth, cfg.model.num_recursions + 1, dtype=bool)
            not_padding = jnp.ones_like(valid) if batch.segments is None else batch.segments > 0
            sums["ce_depth"] = _within(inside, ce)
            sums["targets_depth"] = _within(inside, valid)
            sums["depth_count"] = _within(inside, not_padding)
        return sums

    rows = spec_of(("batch",))
    return shard_map_over_batch(mine, (param_specs(logical_axes(cfg.model)), rows), rows)(
        params, batch
    )


def _groups(length: int) -> np.ndarray:
    """Membership of positions in groups, bool [length groups]."""
    starts = np.array(position_starts(length))
    group = np.searchsorted(starts, np.arange(length), side="right") - 1
    return group[:, None] == np.arange(len(starts))


def _within(inside: Bool[Array, "_ l n"], values: Array) -> Float[Array, "b n"]:
    # Not a matrix product: accelerators would round its factors.
    return jnp.sum(jnp.where(inside, values[..., None].astype(jnp.float32), 0.0), axis=1)


def total(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the sums of all batches, as float64 [sequences ...]."""
    return {
        name: np.concatenate([np.asarray(one[name], np.float64) for one in rows])
        for name in rows[0]
    }
