"""Routers: logits and scores of tokens, capacities, and the selection of tokens.

Expert-choice (paper section 2.2.1): each recursion has a router that scores its candidates, and
the best `k_r` are selected. Token-choice: one router assigns each token a depth. All in float32.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig, RouterConfig
from mor_jax.config.parsing import check
from mor_jax.models.layers.initializers import ZEROS, normal, param
from mor_jax.types import Array, Bool, Float, Int

EXACT = jax.lax.Precision.HIGHEST

TILE = 128
"""Tokens in a tile of the attention and matmul kernels of accelerators; docs/gpu.md."""

TIE = 4
"""Units in the last place of a sequence's highest score within which two scores are tied."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """How one forward pass routes.

    mode: `topk` is the training rule, which compares all tokens of a sequence; `causal` decides
        each token from its own score, so no later token can change it (evaluation, generation).
    capacity_tokens: slots of each recursion, for `topk`; None: those of the configuration.
    step: optimiser step, from 1, for the balancing warm-up of token-choice; None: it is over.
    thresholds: least logit of a selected token at each recursion, for expert-choice under
        `causal`; None: 0, where a router trained with cross-entropy predicts a probability of 1/2.
    """

    mode: Literal["topk", "causal"] = "topk"
    capacity_tokens: tuple[int, ...] | None = None
    step: Int[Array, ""] | int | None = None
    thresholds: Float[Array, "r"] | tuple[float, ...] | None = None


def check_route(route: Route, recursions: int) -> None:
    """Raises `ValueError` unless `route` fits a model with `recursions` recursions."""
    known = ("topk", "causal")
    check(route.mode in known, "route.mode", route.mode, f"must be one of {known}", "Try 'topk'")
    for name in ("capacity_tokens", "thresholds"):
        value = getattr(route, name)
        if value is not None:
            rule = f"needs one number for each of the {recursions} recursions"
            check(len(value) == recursions, f"route.{name}", value, rule, "Or leave it None")


def capacity_tokens(cfg: ModelConfig, length: int, step: int | None = None) -> tuple[int, ...]:
    """Token slots of each recursion in a sequence of `length` tokens: static numbers.

    Expert-choice: k_r = max(1, int(c_r * length)), non-increasing. During capacity warm-up
    (`step` counted from 1) c_r falls from 1 along half a cosine (as in the authors' code), in
    `capacity_warmup_stages` equal stages, each of which compiles once for its own shapes.
    Token-choice: ceil(capacity_factor * (Nr - r) / Nr * length), at most `length`.
    Both are then rounded up to a multiple of `capacity_multiple`, at most `length`.
    """
    multiple = cfg.router.capacity_multiple or 1
    exact = _unrounded(cfg, length, step)
    return tuple(min(length, -(-slots // multiple) * multiple) for slots in exact)


def _unrounded(cfg: ModelConfig, length: int, step: int | None) -> tuple[int, ...]:
    router, nr = cfg.router, cfg.num_recursions
    if router.kind == "expert":
        capacities = warmup_capacity(router, nr, step)
        return tuple(max(1, int(capacity * length)) for capacity in capacities)
    if router.kind == "token" and router.capacity_factor is not None:
        exact = (router.capacity_factor * (nr - r) / nr * length for r in range(nr))
        # The small term keeps a product such as 0.1 * 3 * 10 from rounding up past 3.
        return tuple(max(1, min(length, math.ceil(slots - 1e-9))) for slots in exact)
    return (length,) * nr


def kernel_multiple(platform: str, length: int) -> int:
    """Value of `capacity_multiple=None` for a run on `platform` (see `mesh.platform`).

    On accelerators `TILE`, or the largest power of two that is at most a sixteenth of the sequence
    length, so that short sequences select few tokens beyond their capacities. On CPUs 1.
    """
    if platform == "cpu":
        return 1
    return min(TILE, 1 << max(length // 16, 1).bit_length() - 1)


def warmup_capacity(router: RouterConfig, recursions: int, step: int | None) -> tuple[float, ...]:
    """Capacities at `step` of the warm-up, quantised to its stages; the final ones for None."""
    final, warmup = router.capacities(recursions), router.capacity_warmup_steps
    if step is None or warmup == 0 or step >= warmup:
        return final
    stages = router.capacity_warmup_stages
    progress = (step * stages // warmup) / stages
    remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return tuple(capacity + (1 - capacity) * remaining for capacity in final)


class Router(nnx.Module):
    """Logits of tokens: `outputs` per token from one router, or one from each of `outputs` routers.

    linear: weight (outputs, d). mlp: d -> 2d -> exact GELU -> logits; `separate` routers have
    hidden (outputs, d, 2d) and out (outputs, 2d), a joint one hidden (d, 2d) and out (2d, outputs).
    """

    def __init__(self, cfg: ModelConfig, outputs: int, separate: bool, *, rngs: nnx.Rngs):
        init, d, wide = (
            normal(cfg),
            ("embed", cfg.hidden_size),
            ("router_hidden", 2 * cfg.hidden_size),
        )
        each = ("recursions", outputs)
        self.separate = separate
        self.weight = self.hidden = self.out = nnx.data(None)
        if cfg.router.arch == "linear":
            self.weight = param(rngs, init, (each, d))
        elif separate:
            self.hidden = param(rngs, init, (each, d, wide))
            self.out = param(rngs, init, (each, wide))
        else:
            self.hidden = param(rngs, init, (d, wide))
            self.out = param(rngs, init, (wide, each))

    def one(self, x: Float[Array, "b n d"], recursion: int | Int[Array, ""]) -> Float[Array, "b n"]:
        """Logits of the router of one recursion (expert-choice)."""
        x = x.astype(jnp.float32)
        if self.weight is not None:
            return jnp.einsum("bnd,d->bn", x, self.weight[...][recursion], precision=EXACT)
        hidden = jnp.einsum("bnd,de->bne", x, self.hidden[...][recursion], precision=EXACT)
        hidden = jax.nn.gelu(hidden, approximate=False)
        return jnp.einsum("bne,e->bn", hidden, self.out[...][recursion], precision=EXACT)

    def joint(self, x: Float[Array, "b n d"]) -> Float[Array, "b n r"]:
        """Logits for all depths at once (token-choice)."""
        x = x.astype(jnp.float32)
        if self.weight is not None:
            return jnp.einsum("bnd,rd->bnr", x, self.weight[...], precision=EXACT)
        hidden = jnp.einsum("bnd,de->bne", x, self.hidden[...], precision=EXACT)
        hidden = jax.nn.gelu(hidden, approximate=False)
        return jnp.einsum("bne,er->bnr", hidden, self.out[...], precision=EXACT)


class Routers(nnx.Module):
    """All routing parameters of a model.

    main: the routers that score. aux: auxiliary routers of expert-choice, trained separately to
    predict the selection. bias: balancing bias of token-choice, updated by the train step only.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        router, nr = cfg.router, cfg.num_recursions
        expert = router.kind == "expert"
        self.main = Router(cfg, nr, expert, rngs=rngs)
        self.aux = self.bias = nnx.data(None)
        if expert and router.causal_routing == "aux_router":
            self.aux = Router(cfg, nr, True, rngs=rngs)
        if not expert and router.load_balancing == "loss_free":
            self.bias = param(rngs, ZEROS, (("recursions", nr),))


def expert_score(router: RouterConfig, logits: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """p = alpha * sigmoid(z), alpha * tanh(z), or z itself."""
    if router.activation == "sigmoid":
        return router.alpha * jax.nn.sigmoid(logits)
    return router.alpha * jnp.tanh(logits) if router.activation == "tanh" else logits


def token_score(router: RouterConfig, logits: Float[Array, "*b r"]) -> Float[Array, "*b r"]:
    """w = alpha * softmax(z) over depths, or alpha * sigmoid(z)."""
    if router.activation == "softmax":
        return router.alpha * jax.nn.softmax(logits, axis=-1)
    return router.alpha * jax.nn.sigmoid(logits)


def select(
    scores: Float[Array, "b n"],
    slots: int,
    eligible: Bool[Array, "b n"] | None,
    padding_last: bool,
) -> tuple[Int[Array, "b c"], Bool[Array, "b c"] | None]:
    """The `slots` eligible candidates with the highest scores, in ascending order of position.

    Of tied candidates (see `TIE`) the earlier ones win.

    If fewer are eligible, other tokens pad the remaining slots and `valid` marks them False; they
    are in order of position too, or after all others with `padding_last`. Indices are distinct.

    Raises:
        ValueError: `slots` exceeds the number of candidates.
    """
    n = scores.shape[1]
    rule = f"must be between 1 and {n}, the tokens of the previous recursion"
    check(0 < slots <= n, "capacity_tokens", slots, rule, "Use non-increasing capacities")
    scores = jax.lax.stop_gradient(scores)
    positions = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if eligible is None:
        return _first(_best(scores, slots), positions, slots), None
    best = _best(jnp.where(eligible, scores, -jnp.inf), slots)
    if padding_last:
        ordered = _first(best, jnp.where(eligible, positions, positions + n), slots)
        return jnp.where(ordered < n, ordered, ordered - n), ordered < n
    index = _first(best, positions, slots)
    return index, jnp.take_along_axis(eligible, index, axis=1)


def _first(selected: Bool[Array, "b n"], order: Int[Array, "b n"], slots: int) -> Int[Array, "b c"]:
    """The `order` (below 2n) of the `slots` selected candidates, ascending."""
    behind = 2 * selected.shape[1]
    return jnp.sort(jnp.where(selected, order, behind), axis=1)[:, :slots]


def _best(scores: Float[Array, "b n"], slots: int) -> Bool[Array, "b n"]:
    """Which candidates have the `slots` highest scores; of tied ones the earlier win.

    Two tokens with equal hidden states can get different scores by rounding, which depends on the
    compiler. Scores within `TIE` of the lowest selected one therefore count as equal to it.
    Sorts, because a sort needs no collective; `lax.top_k` would gather all sequences.
    """
    # NaN would make every comparison false and leave slots without an index.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ranked = -jnp.sort(-scores, axis=1)
    lowest = ranked[:, slots - 1 : slots]
    margin = tie_margin(ranked[:, :1], lowest)
    sure = scores > lowest + margin
    tied = (scores >= lowest - margin) & ~sure
    remaining = slots - jnp.sum(sure, axis=1, keepdims=True)
    return sure | (tied & (jnp.cumsum(tied, axis=1) <= remaining))


def tie_margin(best: Float[Array, "*b"], lowest: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Distance from the lowest selected score within which scores count as equal; 0 at infinities.

    best: the sequence's highest score, as a measure of the size of the rounded terms.
    """
    unit = TIE * float(jnp.finfo(jnp.float32).eps)
    margin = unit * jnp.maximum(jnp.abs(best), jnp.abs(lowest))
    return jnp.where(jnp.isfinite(margin), margin, 0.0)
