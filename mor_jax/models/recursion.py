"""The recursions: select tokens, gather them, run the shared block, scatter the results; Nr times.

Recursions are nested: recursion r selects among the tokens of recursion r-1, so its arrays have
the length of its own capacity. The results are scattered back, innermost recursion first, at the
end.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.attention import KeyValue, SequenceContext
from mor_jax.models.block import SavedNames, Stack
from mor_jax.models.layers.token_gather import TokenGather, scatter_to
from mor_jax.models.routing.outputs import (
    RecursionTrace,
    Routing,
    expert_sums,
    stack_sums,
    token_sums,
)
from mor_jax.models.routing.router import (
    Route,
    Routers,
    capacity_tokens,
    expert_score,
    select,
    token_score,
)
from mor_jax.types import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class ActiveTokens:
    """The tokens of one recursion: their places among the parent's tokens and in the sequence.

    The parent is the previous recursion, or the whole sequence for recursion 0.

    gathered: from the parent's tokens; None: all of them, in order.
    index, valid: as in `SequenceContext`.
    """

    gathered: TokenGather | None = None
    index: Int[Array, "b c"] | None = None
    valid: Bool[Array, "b c"] | None = None

    def gather(self, parent: Array) -> Array:
        """The parent's tokens -> the active ones."""
        return parent if self.gathered is None else self.gathered.gather(parent)

    def scatter(self, parent: Array, updated: Array) -> Array:
        """The parent's tokens, with the active ones replaced by `updated`."""
        return updated if self.gathered is None else self.gathered.scatter(parent, updated)

    def select(
        self, slots: Int[Array, "b c"], valid: Bool[Array, "b c"] | None, candidates: int
    ) -> "ActiveTokens":
        """The next recursion's tokens: those at `slots` of these `candidates`."""
        index = slots if self.index is None else jnp.take_along_axis(self.index, slots, axis=1)
        return ActiveTokens(TokenGather.of(slots, valid, candidates), index, valid)

    def select_all(self) -> "ActiveTokens":
        """The next recursion's tokens when it takes all of these."""
        return ActiveTokens(None, self.index, self.valid)


@dataclasses.dataclass(frozen=True)
class RecursionContext:
    """The shared block, its routers and the options of one forward pass."""

    cfg: ModelConfig
    shared: Stack
    routers: Routers | None = None
    route: Route = dataclasses.field(default_factory=Route)
    trace: bool = False

    @property
    def shares_kv(self) -> bool:
        """Whether later recursions attend to the first one's keys and values."""
        return self.cfg.kv_mode != "recursion"

    def capacity_tokens(self, length: int) -> tuple[int, ...]:
        """Token slots of each recursion; under causal routing all of them, whatever passes."""
        if self.route.mode == "causal":
            return (length,) * self.cfg.num_recursions
        return self.route.capacity_tokens or capacity_tokens(self.cfg, length)

    def run_block(
        self,
        parent: Array,
        active: ActiveTokens,
        sequence: SequenceContext,
        recursion: int,
        shared_kv: KeyValue | None,
    ) -> tuple[Array, Array, KeyValue | None]:
        """The active tokens before and after the shared block, and the keys and values to share."""
        inputs = active.gather(parent)
        if recursion == 0 and self.shares_kv:
            # Later recursions attend to every token's keys, so the first one computes them all.
            out, saved = self.shared(parent, sequence, save=("kv",))
            return inputs, active.gather(out), saved.kv
        context = sequence
        if active.index is not None:
            context = sequence.select(active.index, active.valid)
        out, _ = self.shared(
            inputs, context, recursion=recursion, shared_kv=shared_kv, sequence=sequence
        )
        return inputs, out, shared_kv


def run_unrouted(
    context: RecursionContext, x: Float[Array, "b l d"], sequence: SequenceContext
) -> tuple[Float[Array, "b l d"], tuple[Array, ...]]:
    """Runs every token through every recursion; traced, also each effective layer's output."""
    save: SavedNames = ("outputs",) if context.trace else ()
    if context.cfg.is_sequence:
        x, saved = context.shared.interleaved(x, sequence, context.shares_kv, save)
        return x, tuple(saved.outputs.reshape(-1, *x.shape)) if context.trace else ()
    kv, layers = None, []
    for r in range(context.cfg.num_recursions):
        yields_kv = context.shares_kv and r == 0
        x, saved = context.shared(
            x,
            sequence,
            recursion=r,
            shared_kv=kv,
            sequence=sequence,
            save=("kv", *save) if yields_kv else save,
        )
        kv = saved.kv if yields_kv else kv
        layers.extend(saved.outputs if context.trace else ())
    return x, tuple(layers)


def run_expert_choice(
    context: RecursionContext, x: Float[Array, "b l d"], sequence: SequenceContext
) -> tuple[Float[Array, "b l d"], Routing]:
    """Expert-choice: each recursion selects its best candidates, x becomes x + gate * block(x).

    Paper section 2.2.1; `weighted` gating multiplies the block's output by the score.
    """
    active, kv = ActiveTokens(valid=_not_padding(sequence)), None
    states, selections, sums, traces = [x], [], [], []
    for r, slots in enumerate(context.capacity_tokens(x.shape[1])):
        parent = states[-1]
        logits, score, trained = _expert_logits(context, parent, r)
        following, selected = _select_experts(context, active, score, trained, r, slots)
        sums.append(expert_sums(logits, selected, active.valid, _decision_logit(context), trained))
        active = following
        inputs, out, kv = context.run_block(parent, active, sequence, r, kv)
        if context.cfg.router.gating == "weighted":
            out = active.gather(score[..., None]).astype(out.dtype) * out
        states.append(inputs + out)
        selections.append(active)
        residual = _scatter_all(states, selections) if context.trace else None
        traces.append(RecursionTrace(logits, trained, active.index, active.valid, residual))
    routing = Routing(_depth(selections, x.shape), stack_sums(sums), None, tuple(traces))
    return _scatter_all(states, selections), routing


def run_token_choice(
    context: RecursionContext, x: Float[Array, "b l d"], sequence: SequenceContext
) -> tuple[Float[Array, "b l d"], Routing]:
    """Token-choice: each token chooses its depth once, from the input of recursion 0.

    Paper section 2.2.1. A token that chose recursion e as its last exits after it as
    x + w_e * block output. A token dropped for lack of capacity exits one recursion earlier, with
    the same weight.
    """
    logits = _routers(context).main.joint(_tempered(context, x))
    weights = token_score(context.cfg.router, logits)
    choice = depth_choice(context, weights)
    gate = jnp.take_along_axis(weights, choice[..., None], axis=-1)
    candidates = (choice, gate[..., 0])
    active, kv = ActiveTokens(valid=_not_padding(sequence)), None
    states, selections, traces, overflow = [x], [], [], []
    for r, slots in enumerate(context.capacity_tokens(x.shape[1])):
        active, dropped = _admit(context, active, *candidates, r, slots)
        candidates = (active.gather(candidates[0]), active.gather(candidates[1]))
        _, out, kv = context.run_block(states[-1], active, sequence, r, kv)
        states.append(out)
        selections.append(active)
        overflow.append(dropped)
        traces.append(RecursionTrace(logits, logits, active.index, active.valid))
    depth, block_output = _depth(selections, x.shape), _scatter_all(states, selections)
    if context.cfg.router.gating == "weighted":
        block_output = gate.astype(block_output.dtype) * block_output
    out = jnp.where((depth > 0)[..., None], x + block_output, x)
    valid = jnp.ones(choice.shape) if sequence.segments is None else sequence.segments > 0
    sums = token_sums(logits, weights, choice, valid.astype(jnp.float32), jnp.stack(overflow))
    return out, Routing(depth, None, sums, tuple(traces))


def _routers(context: RecursionContext) -> Routers:
    assert context.routers is not None
    return context.routers


def _tempered(context: RecursionContext, x: Array) -> Array:
    return x.astype(jnp.float32) / context.cfg.router.temperature


def _not_padding(sequence: SequenceContext) -> Bool[Array, "b l"] | None:
    return None if sequence.segments is None else sequence.segments > 0


def _expert_logits(
    context: RecursionContext, x: Float[Array, "b n d"], recursion: int
) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Float[Array, "b n"]]:
    """Logits and scores of the main router, and the logits trained to predict the selection."""
    routers = _routers(context)
    logits = routers.main.one(_tempered(context, x), recursion)
    trained = logits
    if routers.aux is not None:
        trained = routers.aux.one(jax.lax.stop_gradient(x), recursion)
    return logits, expert_score(context.cfg.router, logits), trained


def _decision_logit(context: RecursionContext) -> float:
    """Logit from which on the accuracy metrics count a router's prediction as "selected"."""
    router = context.cfg.router
    return 0.5 if router.activation == "none" and router.causal_routing != "aux_router" else 0.0


def _select_experts(
    context: RecursionContext,
    candidates: ActiveTokens,
    score: Float[Array, "b n"],
    trained: Float[Array, "b n"],
    recursion: int,
    slots: int,
) -> tuple[ActiveTokens, Bool[Array, "b n"]]:
    """Expert-choice: the tokens of `recursion`, at most `slots`, and which candidates they are."""
    n, eligible = score.shape[1], candidates.valid
    causal = context.route.mode == "causal"
    takes_all = context.cfg.router.capacities(context.cfg.num_recursions)[recursion] == 1.0
    if takes_all if causal else slots == n:
        selected = jnp.ones(score.shape, bool) if eligible is None else eligible
        return candidates.select_all(), selected
    if causal:
        thresholds = context.route.thresholds
        passing = trained >= (0.0 if thresholds is None else thresholds[recursion])
        eligible = passing if eligible is None else passing & eligible
    index, valid = select(score, slots, eligible, not context.shares_kv)
    active = candidates.select(index, valid, n)
    return active, active.gathered.selected


def depth_choice(context: RecursionContext, weights: Float[Array, "b l r"]) -> Int[Array, "b l"]:
    """Argmax over depths of score plus balancing bias; the deepest during balancing warm-up."""
    bias, router = _routers(context).bias, context.cfg.router
    ranked = weights if bias is None else weights + jax.lax.stop_gradient(bias[...])[None, None]
    choice = jnp.argmax(ranked, axis=-1).astype(jnp.int32)
    if context.route.step is None or router.balance_warmup_steps == 0:
        return choice
    return jnp.where(
        context.route.step < router.balance_warmup_steps, context.cfg.num_recursions - 1, choice
    )


def _admit(
    context: RecursionContext,
    candidates: ActiveTokens,
    choice: Int[Array, "b n"],
    gate: Float[Array, "b n"],
    recursion: int,
    slots: int,
) -> tuple[ActiveTokens, Float[Array, ""]]:
    """Token-choice: the tokens of `recursion`, and how many were dropped for lack of capacity.

    choice: last recursion chosen by each candidate. gate: its weight; lowest weights drop first.
    """
    if recursion == 0 and slots == choice.shape[1]:
        return candidates.select_all(), jnp.zeros((), jnp.float32)
    continues = choice >= recursion
    if candidates.valid is not None:
        continues = continues & candidates.valid
    index, valid = select(gate, slots, continues, not context.shares_kv)
    dropped = jnp.sum(continues, dtype=jnp.float32) - jnp.sum(valid, dtype=jnp.float32)
    return candidates.select(index, valid, choice.shape[1]), dropped


def _scatter_all(states: list[Array], selections: list[ActiveTokens]) -> Array:
    """The whole sequence: the innermost states, scattered back recursion by recursion."""
    updated = states[-1]
    for parent, active in zip(reversed(states[:-1]), reversed(selections), strict=True):
        updated = active.scatter(parent, updated)
    return updated


def _depth(selections: list[ActiveTokens], shape: tuple[int, ...]) -> Int[Array, "b l"]:
    """Recursions that each token of the sequence went through."""
    b, length = shape[:2]
    depth = jnp.zeros((b, length), jnp.int32)
    for active in selections:
        slots = (b, length) if active.index is None else active.index.shape
        one = jnp.ones(slots, jnp.int32) if active.valid is None else active.valid.astype(jnp.int32)
        depth = depth + (one if active.index is None else scatter_to(one, active.index, length))
    return depth
