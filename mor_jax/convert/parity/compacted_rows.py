"""Emulates a bug of the authors' token-choice code, so that recordings of it can be compared.

The authors' router removes the sequences of a batch in which no token continues, runs the block on
the others, and then indexes the routing of the whole batch by positions in the compacted one. After
a removed sequence, every sequence thus uses the depths and weights of an earlier one: its tokens
exit with a wrong weight, twice, or never. mor_jax does not have this bug; only `convert.parity`
emulates it, under the name `compacted_rows`.
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
    """(recursion, sequence), both from 0, where a sequence uses the routing of another one.

    depth: number of recursions of each token.
    """
    affected = []
    for r in range(int(np.max(depth, initial=0))):
        rows = np.flatnonzero(np.any(depth > r, axis=1))
        affected += [(r, int(row)) for position, row in enumerate(rows) if position != row]
    return affected


def forward(cfg: ModelConfig, params: Params, batch: Batch, route: Route) -> ModelOutput:
    """As `params.forward` with a trace, for a token-choice model, with the bug."""
    return model_of(cfg, params, _Compacted)(batch, route, trace=True)


class _Compacted(Transformer):
    """A token-choice model whose recursion stage has the bug."""

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
    """As `run_token_choice`, but with the routing of another sequence where the bug applies."""
    assert stage.routers is not None
    router = stage.cfg.router
    logits = stage.routers.main.joint(x.astype(jnp.float32) / router.temperature)
    weights = token_score(router, logits)
    choice = depth_choice(stage, weights)
    gate = jnp.take_along_axis(weights, choice[..., None], axis=-1)[..., 0]
    if router.gating != "weighted":
        gate = jnp.ones_like(gate)
    state, exited, kv, traces = x, jnp.zeros_like(x), None, []
    for r in range(stage.cfg.num_recursions):
        active = choice >= r
        tokens = _active_tokens(active, gate)
        _, out, kv = stage.run_block(state, tokens, row, r, kv)
        out = tokens.scatter(state, out)
        source = _sources(active)
        source_choice = choice[source]
        exited = exited + jnp.where(
            (active & (source_choice == r))[..., None], gate[source][..., None] * out, 0.0
        )
        state = jnp.where((active & (source_choice > r))[..., None], out, state)
        traces.append(RecursionTrace(logits, logits, tokens.index, tokens.valid))
    valid, dropped = jnp.ones(choice.shape), jnp.zeros(stage.cfg.num_recursions)
    sums = token_sums(logits, weights, choice, valid, dropped)
    return x + exited, Routing(choice + 1, None, sums, tuple(traces))


def _active_tokens(active: Bool[Array, "b l"], gate: Float[Array, "b l"]) -> ActiveTokens:
    """The active tokens, with slots for the whole sequence."""
    length = active.shape[1]
    index, valid = select(gate, length, active, padding_last=True)
    return ActiveTokens().select(index, valid, length)


def _sources(active: Bool[Array, "b l"]) -> Int[Array, "b"]:
    """For each sequence the one whose routing it uses: its position among those not removed."""
    continues = jnp.any(active, axis=1)
    return jnp.where(continues, jnp.cumsum(continues) - 1, 0)
