"""One fault of the authors' token-choice code, emulated so that recordings of it can be compared.

The authors' router drops the rows of a batch in which no token goes on, runs the block on what is
left, and then asks the routing of the whole batch by the places of the rows that are left. Behind
a row that was dropped, every row so takes the depths and weights of an earlier one: tokens leave
with a weight that is not theirs, leave twice, or never. mor_jax does not do this; only
`convert.parity` can, by the name `compacted_rows`.
"""

import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.models.attention import SequenceContext
from mor_jax.models.params import model_of
from mor_jax.models.recursion import ActiveTokens, RecursionContext, depth_choice
from mor_jax.models.routing.outputs import RecursionTrace, Routing, token_sums
from mor_jax.models.routing.router import Route, select, token_score
from mor_jax.models.transformer import ModelOutput, Transformer
from mor_jax.types import Array, Batch, Bool, Float, Int, Params


def first_compacted(depth: Int[np.ndarray, "b l"]) -> list[tuple[int, int]]:
    """Where the fault shows: (recursion, row), both from 0, for rows that take another's routing.

    depth: recursions of each token.
    """
    found = []
    for r in range(int(np.max(depth, initial=0))):
        rows = np.flatnonzero(np.any(depth > r, axis=1))
        found += [(r, int(row)) for place, row in enumerate(rows) if place != row]
    return found


def forward(cfg: ModelConfig, params: Params, batch: Batch, route: Route) -> ModelOutput:
    """As `state.forward` with a trace, for a token-choice model, with the fault."""
    return model_of(cfg, params, _Compacted)(batch, route, trace=True)


class _Compacted(Transformer):
    """A token-choice model whose recursion stage has the fault."""

    def _recur(
        self, x: Float[Array, "b l d"], row: SequenceContext, route: Route, trace: bool
    ) -> tuple[Float[Array, "b l d"], Routing | None, tuple[Array, ...]]:
        assert self.shared is not None
        x, routing = _run(
            RecursionContext(self.cfg, self.shared, self.router, route, trace), x, row
        )
        return x, routing, (x,)


def _run(
    stage: RecursionContext, x: Float[Array, "b l d"], row: SequenceContext
) -> tuple[Float[Array, "b l d"], Routing]:
    """As `run_token_choice`, but the routing of a sequence is read from another one."""
    assert stage.routers is not None
    router = stage.cfg.router
    logits = stage.routers.main.joint(x.astype(jnp.float32) / router.temperature)
    weights = token_score(router, logits)
    choice = depth_choice(stage, weights)
    gate = jnp.take_along_axis(weights, choice[..., None], axis=-1)[..., 0]
    if router.gating != "weighted":
        gate = jnp.ones_like(gate)
    state, left, kv, visits = x, jnp.zeros_like(x), None, []
    for r in range(stage.cfg.num_recursions):
        active = choice >= r
        level = _level(active, gate)
        _, out, kv = stage.run_block(state, level, row, r, kv)
        out = level.scatter(state, out)
        source = _sources(active)
        theirs = choice[source]
        left = left + jnp.where(
            (active & (theirs == r))[..., None], gate[source][..., None] * out, 0.0
        )
        state = jnp.where((active & (theirs > r))[..., None], out, state)
        visits.append(RecursionTrace(logits, logits, level.index, level.valid))
    here, lost = jnp.ones(choice.shape), jnp.zeros(stage.cfg.num_recursions)
    sums = token_sums(logits, weights, choice, here, lost)
    return x + left, Routing(choice + 1, None, sums, tuple(visits))


def _level(active: Bool[Array, "b l"], gate: Float[Array, "b l"]) -> ActiveTokens:
    """The active tokens of the whole row, in room for all."""
    length = active.shape[1]
    index, valid = select(gate, length, active, padding_last=True)
    return ActiveTokens().select(index, valid, length)


def _sources(active: Bool[Array, "b l"]) -> Int[Array, "b"]:
    """For each row the one whose routing it takes: its place among the rows that are left."""
    present = jnp.any(active, axis=1)
    return jnp.where(present, jnp.cumsum(present) - 1, 0)
