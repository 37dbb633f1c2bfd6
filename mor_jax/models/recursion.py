"""The recursion stage: choose tokens, run the shared block on them, put them back; Nr times.

Recursions are nested: recursion r works on tokens that recursion r-1 kept, so its tensors have the
length of its own capacity, and results are put back level by level at the end.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.attention import KeyValue, SequenceContext
from mor_jax.models.block import Keep, Stack
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
    """The tokens of one recursion: where they sit in the level above, and in the row.

    rows: None when this level holds all tokens of the one above, in the same order.
    index, valid: as in `Scope`.
    """

    gathered: TokenGather | None = None
    index: Int[Array, "b c"] | None = None
    valid: Bool[Array, "b c"] | None = None

    def gather(self, above: Array) -> Array:
        """Tokens of the level above -> tokens of this one."""
        return above if self.gathered is None else self.gathered.gather(above)

    def scatter(self, above: Array, here: Array) -> Array:
        """The level above with the tokens of this one replaced."""
        return here if self.gathered is None else self.gathered.scatter(above, here)

    def next(
        self, index: Int[Array, "b c"], valid: Bool[Array, "b c"] | None, candidates: int
    ) -> "ActiveTokens":
        """The level of the slots `index` of this one."""
        row = index if self.index is None else jnp.take_along_axis(self.index, index, axis=1)
        return ActiveTokens(TokenGather.of(index, valid, candidates), row, valid)

    def all_of(self) -> "ActiveTokens":
        """The next level when everybody goes on."""
        return ActiveTokens(None, self.index, self.valid)


@dataclasses.dataclass(frozen=True)
class RecursionContext:
    """The shared block, its routers and the options that a pass through them needs."""

    cfg: ModelConfig
    shared: Stack
    routers: Routers | None = None
    route: Route = dataclasses.field(default_factory=Route)
    trace: bool = False

    @property
    def shares_kv(self) -> bool:
        """Whether later recursions attend to the first one's keys and values."""
        return self.cfg.kv_mode != "recursion"

    def counts(self, length: int) -> tuple[int, ...]:
        """Room at each recursion; causal routing has room for all, whoever passes."""
        if self.route.mode == "causal":
            return (length,) * self.cfg.num_recursions
        return self.route.counts or capacity_tokens(self.cfg, length)

    def block(
        self,
        above: Array,
        level: ActiveTokens,
        row: SequenceContext,
        recursion: int,
        kv: KeyValue | None,
    ) -> tuple[Array, Array, KeyValue | None]:
        """The level's tokens before and after the shared block, and the row's keys and values."""
        here = level.gather(above)
        if recursion == 0 and self.shares_kv:
            # Later recursions attend to every token's keys, so the first one computes them all.
            out, kept = self.shared(above, row, keep=("kv",))
            return here, level.gather(out), kept.kv
        scope = row if level.index is None else row.select(level.index, level.valid)
        out, _ = self.shared(here, scope, recursion=recursion, shared=kv, row=row)
        return here, out, kv


def run_plain(
    stage: RecursionContext, x: Float[Array, "b l d"], row: SequenceContext
) -> tuple[Float[Array, "b l d"], tuple[Array, ...]]:
    """Every token goes through every recursion; also (traced) each effective layer's output."""
    keep: Keep = ("outputs",) if stage.trace else ()
    if stage.cfg.is_sequence:
        x, kept = stage.shared.interleaved(x, row, stage.shares_kv, keep)
        return x, tuple(kept.outputs.reshape(-1, *x.shape)) if stage.trace else ()
    kv, layers = None, []
    for r in range(stage.cfg.num_recursions):
        first = stage.shares_kv and r == 0
        asked: Keep = ("kv", *keep) if first else keep
        x, kept = stage.shared(x, row, recursion=r, shared=kv, row=row, keep=asked)
        kv = kept.kv if first else kv
        layers.extend(kept.outputs if stage.trace else ())
    return x, tuple(layers)


def run_expert(
    stage: RecursionContext, x: Float[Array, "b l d"], row: SequenceContext
) -> tuple[Float[Array, "b l d"], Routing]:
    """Expert-choice: at each recursion the best candidates become x + gate * block(x).

    Paper section 2.2.1; `weighted` gating multiplies the block's output by the score.
    """
    level = ActiveTokens(valid=_present(row))
    states, levels, sums, visits = [x], [], [], []
    kv = None
    for r, count in enumerate(stage.counts(x.shape[1])):
        above = states[-1]
        logits, score, trained = _expert_logits(stage, above, r)
        chosen_level, chosen = _choose(stage, level, score, trained, (r, count))
        sums.append(expert_sums(logits, chosen, level.valid, _cut(stage), trained))
        here, out, kv = stage.block(above, chosen_level, row, r, kv)
        if stage.cfg.router.gating == "weighted":
            out = chosen_level.gather(score[..., None]).astype(out.dtype) * out
        states.append(here + out)
        levels.append(chosen_level)
        level = chosen_level
        full = _unwind(states, levels) if stage.trace else None
        visits.append(RecursionTrace(logits, trained, level.index, level.valid, full))
    routing = Routing(_depth(levels, x.shape), stack_sums(sums), None, tuple(visits))
    return _unwind(states, levels), routing


def run_token(
    stage: RecursionContext, x: Float[Array, "b l d"], row: SequenceContext
) -> tuple[Float[Array, "b l d"], Routing]:
    """Token-choice: each token picks its depth once, from the stage's input.

    Paper section 2.2.1. A token of depth e leaves after recursion e as x + w_e * block output; one
    that finds no room leaves one recursion earlier, with the same weight.
    """
    logits = _routers(stage).main.joint(_cooled(stage, x))
    weights = token_score(stage.cfg.router, logits)
    choice = depth_choice(stage, weights)
    gate = jnp.take_along_axis(weights, choice[..., None], axis=-1)
    tokens = (choice, gate[..., 0])
    level, kv = ActiveTokens(valid=_present(row)), None
    states, levels, visits, overflow = [x], [], [], []
    for r, count in enumerate(stage.counts(x.shape[1])):
        level, lost = _admit(stage, level, tokens, (r, count))
        tokens = (level.gather(tokens[0]), level.gather(tokens[1]))
        _, out, kv = stage.block(states[-1], level, row, r, kv)
        states.append(out)
        levels.append(level)
        overflow.append(lost)
        visits.append(RecursionTrace(logits, logits, level.index, level.valid))
    depth, left = _depth(levels, x.shape), _unwind(states, levels)
    if stage.cfg.router.gating == "weighted":
        left = gate.astype(left.dtype) * left
    out = jnp.where((depth > 0)[..., None], x + left, x)
    here = jnp.ones(choice.shape) if row.segments is None else row.segments > 0
    sums = token_sums(logits, weights, choice, here.astype(jnp.float32), jnp.stack(overflow))
    return out, Routing(depth, None, sums, tuple(visits))


def _routers(stage: RecursionContext) -> Routers:
    assert stage.routers is not None
    return stage.routers


def _cooled(stage: RecursionContext, x: Array) -> Array:
    return x.astype(jnp.float32) / stage.cfg.router.temperature


def _present(row: SequenceContext) -> Bool[Array, "b l"] | None:
    return None if row.segments is None else row.segments > 0


def _expert_logits(
    stage: RecursionContext, x: Float[Array, "b n d"], recursion: int
) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Float[Array, "b n"]]:
    """Logits and scores of the main router, and the logits that learn to predict the choice."""
    routers = _routers(stage)
    logits = routers.main.one(_cooled(stage, x), recursion)
    trained = logits
    if routers.aux is not None:
        trained = routers.aux.one(jax.lax.stop_gradient(x), recursion)
    return logits, expert_score(stage.cfg.router, logits), trained


def _cut(stage: RecursionContext) -> float:
    """Logit from which on a router's answer counts as "chosen" in the accuracy metrics."""
    router = stage.cfg.router
    return 0.5 if router.activation == "none" and router.causal_routing != "aux_router" else 0.0


def _choose(
    stage: RecursionContext,
    level: ActiveTokens,
    score: Float[Array, "b n"],
    trained: Float[Array, "b n"],
    step: tuple[int, int],
) -> tuple[ActiveTokens, Bool[Array, "b n"]]:
    """Expert-choice's next level, and which candidates it holds. step: recursion, its room."""
    recursion, count = step
    n, eligible = score.shape[1], level.valid
    causal = stage.route.mode == "causal"
    takes_all = stage.cfg.router.shares(stage.cfg.num_recursions)[recursion] == 1.0
    if takes_all if causal else count == n:
        here = jnp.ones(score.shape, bool) if eligible is None else eligible
        return level.all_of(), here
    if causal:
        thresholds = stage.route.thresholds
        passing = trained >= (0.0 if thresholds is None else thresholds[recursion])
        eligible = passing if eligible is None else passing & eligible
    index, valid = select(score, count, eligible, not stage.shares_kv)
    chosen = level.next(index, valid, n)
    return chosen, chosen.gathered.chosen


def depth_choice(stage: RecursionContext, weights: Float[Array, "b l r"]) -> Int[Array, "b l"]:
    """Argmax over depths of score plus balancing bias; the deepest during balancing warm-up."""
    bias, router = _routers(stage).bias, stage.cfg.router
    ranked = weights if bias is None else weights + jax.lax.stop_gradient(bias[...])[None, None]
    choice = jnp.argmax(ranked, axis=-1).astype(jnp.int32)
    if stage.route.step is None or router.balance_warmup_steps == 0:
        return choice
    return jnp.where(
        stage.route.step < router.balance_warmup_steps, stage.cfg.num_recursions - 1, choice
    )


def _admit(
    stage: RecursionContext,
    level: ActiveTokens,
    tokens: tuple[Int[Array, "b n"], Float[Array, "b n"]],
    step: tuple[int, int],
) -> tuple[ActiveTokens, Float[Array, ""]]:
    """Token-choice's next level, and how many tokens wanted to go on but found no room.

    tokens: chosen depth and its weight; the lowest weight is turned away first. step: recursion
    and its room.
    """
    (choice, gate), (recursion, count) = tokens, step
    nobody = jnp.zeros((), jnp.float32)
    if recursion == 0 and count == choice.shape[1]:
        return level.all_of(), nobody
    wanted = choice >= recursion
    if level.valid is not None:
        wanted = wanted & level.valid
    index, valid = select(gate, count, wanted, not stage.shares_kv)
    lost = jnp.sum(wanted, dtype=jnp.float32) - jnp.sum(valid, dtype=jnp.float32)
    return level.next(index, valid, choice.shape[1]), lost


def _unwind(states: list[Array], levels: list[ActiveTokens]) -> Array:
    """The whole row: the deepest states, put back level by level."""
    deepest = states[-1]
    for above, level in zip(reversed(states[:-1]), reversed(levels), strict=True):
        deepest = level.scatter(above, deepest)
    return deepest


def _depth(levels: list[ActiveTokens], shape: tuple[int, ...]) -> Int[Array, "b l"]:
    """Recursions that each token of the row went through."""
    b, length = shape[:2]
    depth = jnp.zeros((b, length), jnp.int32)
    for level in levels:
        slots = (b, length) if level.index is None else level.index.shape
        here = jnp.ones(slots, jnp.int32) if level.valid is None else level.valid.astype(jnp.int32)
        depth = depth + (here if level.index is None else scatter_to(here, level.index, length))
    return depth
