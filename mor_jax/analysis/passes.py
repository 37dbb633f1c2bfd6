"""Forward passes that keep what each token did: its depth, its routers' logits, its loss."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.layers.token_gather import scatter_to
from mor_jax.models.params import forward, logits_table
from mor_jax.models.routing.outputs import RecursionTrace, Routing
from mor_jax.models.routing.router import Route
from mor_jax.runtime.free_memory import CheckedFunction
from mor_jax.training.losses import token_losses
from mor_jax.types import IGNORE, Array, Batch, Bool, Float, Int, Params

_LOGITS = 2**24
"""Logits (rows x positions x vocabulary) that are there at one time: 64 MiB of float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedOutput:
    """One pass, token by token.

    depth: recursions that the token went through. ahead: loss of predicting the next token from
    here, in nats; NaN where there is no target. logits: of the router's decision at each recursion,
    NaN for tokens that had left before and for padding: of the main router, or of the auxiliary one
    that stands in for it; for token-choice of each depth. main: of the main router, where an
    auxiliary one decides.
    """

    depth: Int[Array, "b l"]
    ahead: Float[Array, "b l"]
    logits: Float[Array, "r b l"]
    main: Float[Array, "r b l"] | None


def passes(
    cfg: ModelConfig, modes: tuple[str, ...], params: Params, batch: Batch, thresholds: Array | None
) -> dict[str, RoutedOutput]:
    """One pass for each routing of `modes` (`causal`, `topk`); traceable, shapes are static.

    thresholds: float32 [r], of causal routing of expert-choice; None: 0.
    """
    return {
        mode: _pass(cfg, Route(mode=mode, thresholds=thresholds), params, batch) for mode in modes
    }


def compiled(cfg: ModelConfig, modes: tuple[str, ...]) -> CheckedFunction:
    """`passes` of params, batch and thresholds, compiled once for all batches of a shape."""
    return CheckedFunction(partial(passes, cfg, modes), "batch_size")


def _pass(cfg: ModelConfig, route: Route, params: Params, batch: Batch) -> RoutedOutput:
    out = forward(cfg, params, batch, route)
    assert out.routing is not None
    (rows, _), table = batch.targets.shape, logits_table(cfg, params)
    chunk = max(1, _LOGITS // (rows * table.shape[0]))
    ahead, _ = token_losses(out.hidden, table, batch.targets, chunk)
    ahead = jnp.where(batch.targets == IGNORE, jnp.nan, ahead)
    decisive, main = _on_the_row(out.routing, batch)
    two = cfg.router.kind == "expert" and cfg.router.causal_routing == "aux_router"
    return RoutedOutput(out.routing.depth, ahead, decisive, main if two else None)


def _on_the_row(
    routing: Routing, batch: Batch
) -> tuple[Float[Array, "r b l"], Float[Array, "r b l"]]:
    """Decisive and main logits of every recursion at the places of the row, NaN elsewhere."""
    present = jnp.ones(batch.tokens.shape, bool)
    if batch.segments is not None:
        present = batch.segments > 0
    if routing.token is not None:
        every = jnp.moveaxis(routing.recursion_traces[0].logits, -1, 0)
        every = jnp.where(present[None], every, jnp.nan)
        return every, every
    decisive, main = [], []
    before: RecursionTrace | None = None
    for visit in routing.recursion_traces:
        for made, logits in ((decisive, visit.trained), (main, visit.logits)):
            made.append(jnp.where(present, _placed(logits, before, present.shape[1]), jnp.nan))
        before = visit
    return jnp.stack(decisive), jnp.stack(main)


def _placed(
    logits: Float[Array, "b n"], before: RecursionTrace | None, length: int
) -> Float[Array, "b l"]:
    # Candidates of a recursion sit in the slots of the one before.
    if before is None or before.index is None:
        return logits
    there: Bool[Array, "b n"] = jnp.ones(logits.shape, bool)
    if before.valid is not None:
        there = before.valid
    values = scatter_to(jnp.where(there, logits, 0.0), before.index, length)
    return jnp.where(scatter_to(there, before.index, length), values, jnp.nan)
