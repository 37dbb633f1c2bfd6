"""Forward passes that return depth, router logits and loss of every token."""

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

_MAX_LOGITS = 2**24
"""Most output logits (batch x positions x vocabulary) at one time: 64 MiB of float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedOutput:
    """One pass, token by token.

    depth: recursions of the token. ahead: loss of predicting the next token from this one, in nats;
    NaN without a target. logits: of the router that decides causally (the auxiliary one, if the
    model has it), at each recursion; NaN for padding and for tokens that exited before. For
    token-choice: of each depth. main: the same of the main router, if an auxiliary one decides.
    """

    depth: Int[Array, "b l"]
    ahead: Float[Array, "b l"]
    logits: Float[Array, "r b l"]
    main: Float[Array, "r b l"] | None


def passes(
    cfg: ModelConfig, modes: tuple[str, ...], params: Params, batch: Batch, thresholds: Array | None
) -> dict[str, RoutedOutput]:
    """One pass per routing in `modes` (`causal`, `topk`); traceable, with static shapes.

    thresholds: logits from which causal routing selects (expert-choice), float32 [r]; None: 0.
    """
    return {
        mode: _pass(cfg, Route(mode=mode, thresholds=thresholds), params, batch) for mode in modes
    }


def compiled(cfg: ModelConfig, modes: tuple[str, ...]) -> CheckedFunction:
    """`passes` as a function of params, batch and thresholds, compiled once per batch shape."""
    return CheckedFunction(partial(passes, cfg, modes), "batch_size")


def _pass(cfg: ModelConfig, route: Route, params: Params, batch: Batch) -> RoutedOutput:
    out = forward(cfg, params, batch, route)
    assert out.routing is not None
    (batch_size, _), table = batch.targets.shape, logits_table(cfg, params)
    chunk = max(1, _MAX_LOGITS // (batch_size * table.shape[0]))
    ahead, _ = token_losses(out.hidden, table, batch.targets, chunk)
    ahead = jnp.where(batch.targets == IGNORE, jnp.nan, ahead)
    decisive, main = _logits_by_position(out.routing, batch)
    has_auxiliary = cfg.router.kind == "expert" and cfg.router.causal_routing == "aux_router"
    return RoutedOutput(out.routing.depth, ahead, decisive, main if has_auxiliary else None)


def _logits_by_position(
    routing: Routing, batch: Batch
) -> tuple[Float[Array, "r b l"], Float[Array, "r b l"]]:
    """Deciding and main logits of every recursion by position in the sequence, NaN elsewhere."""
    valid = jnp.ones(batch.tokens.shape, bool)
    if batch.segments is not None:
        valid = batch.segments > 0
    if routing.token is not None:
        by_depth = jnp.moveaxis(routing.recursion_traces[0].logits, -1, 0)
        by_depth = jnp.where(valid[None], by_depth, jnp.nan)
        return by_depth, by_depth
    decisive, main = [], []
    previous: RecursionTrace | None = None
    for trace in routing.recursion_traces:
        for collected, logits in ((decisive, trace.trained), (main, trace.logits)):
            collected.append(
                jnp.where(valid, _scattered(logits, previous, valid.shape[1]), jnp.nan)
            )
        previous = trace
    return jnp.stack(decisive), jnp.stack(main)


def _scattered(
    logits: Float[Array, "b n"], previous: RecursionTrace | None, length: int
) -> Float[Array, "b l"]:
    # The candidates of a recursion are the tokens that the previous one selected.
    if previous is None or previous.index is None:
        return logits
    valid: Bool[Array, "b n"] = jnp.ones(logits.shape, bool)
    if previous.valid is not None:
        valid = previous.valid
    values = scatter_to(jnp.where(valid, logits, 0.0), previous.index, length)
    return jnp.where(scatter_to(valid, previous.index, length), values, jnp.nan)
