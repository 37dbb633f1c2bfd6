"""Routers: logits and scores of tokens, capacities, and the choice of who goes on.

Expert-choice (paper section 2.2.1): every recursion has a router that scores its candidates, and
the best `k_r` go on. Token-choice: one router gives each token a depth. All of it runs in float32.
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
"""Tokens that the attention and product kernels of accelerators handle at once; docs/gpu.md."""

TIE = 4
"""Units in the last place, of a row's highest score, within which two scores are a tie."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """How one forward pass routes.

    mode: `topk` is the training rule, which looks at the whole row; `causal` decides each token
        from its own score, so that no later token can change it (evaluation, generation).
    counts: tokens kept at each recursion, for `topk`; None: `capacity_tokens` of the row length.
    step: optimiser step, counted from 1, for token-choice's balancing warm-up; None: it is over.
    thresholds: logit that a token must reach at each recursion, for expert-choice under `causal`;
        None: 0, the point where a router trained by cross-entropy says one half.
    """

    mode: Literal["topk", "causal"] = "topk"
    counts: tuple[int, ...] | None = None
    step: Int[Array, ""] | int | None = None
    thresholds: Float[Array, "r"] | tuple[float, ...] | None = None


def check_route(route: Route, recursions: int) -> None:
    """Raises `ValueError` unless `route` fits a model of `recursions` recursions."""
    known = ("topk", "causal")
    check(route.mode in known, "route.mode", route.mode, f"must be one of {known}", "Try 'topk'")
    for name in ("counts", "thresholds"):
        value = getattr(route, name)
        if value is not None:
            rule = f"needs one number for each of the {recursions} recursions"
            check(len(value) == recursions, f"route.{name}", value, rule, "Or leave it None")


def capacity_tokens(cfg: ModelConfig, length: int, step: int | None = None) -> tuple[int, ...]:
    """Tokens that each recursion has room for in a row of `length`: static numbers.

    Expert-choice: k_r = max(1, int(c_r * length)), non-increasing. During capacity warm-up
    (`step` counted from 1) c_r falls from 1 along half a cosine (as the authors' code does),
    in `capacity_warmup_levels` equal stairs, each a shape of its own that compiles once.
    Token-choice: ceil(capacity_factor * (Nr - r) / Nr * length), at most `length`.
    Both are then rounded up to `capacity_multiple`, to `length` at most.
    """
    multiple = cfg.router.capacity_multiple or 1
    exact = _exact_counts(cfg, length, step)
    return tuple(min(length, -(-count // multiple) * multiple) for count in exact)


def _exact_counts(cfg: ModelConfig, length: int, step: int | None) -> tuple[int, ...]:
    router, nr = cfg.router, cfg.num_recursions
    if router.kind == "expert":
        shares = warmup_capacity(router, nr, step)
        return tuple(max(1, int(share * length)) for share in shares)
    if router.kind == "token" and router.capacity_factor is not None:
        rooms = (router.capacity_factor * (nr - r) / nr * length for r in range(nr))
        # The small term keeps a product such as 0.1 * 3 * 10 from rounding up past 3.
        return tuple(max(1, min(length, math.ceil(room - 1e-9))) for room in rooms)
    return (length,) * nr


def kernel_multiple(platform: str, length: int) -> int:
    """What `capacity_multiple=None` stands for in a run on a platform (see `sharding.platform`).

    On accelerators `TILE`, or the largest power of two that is at most a sixteenth of the row, so
    that short rows do not keep many more tokens than their capacities say. On CPUs 1.
    """
    if platform == "cpu":
        return 1
    return min(TILE, 1 << max(length // 16, 1).bit_length() - 1)


def warmup_capacity(router: RouterConfig, recursions: int, step: int | None) -> tuple[float, ...]:
    """Capacities at `step` of the warm-up, quantised to its levels; final ones for None."""
    shares, warmup = router.shares(recursions), router.capacity_warmup_steps
    if step is None or warmup == 0 or step >= warmup:
        return shares
    levels = router.capacity_warmup_stages
    progress = (step * levels // warmup) / levels
    left = 0.5 * (1 + math.cos(math.pi * progress))
    return tuple(share + (1 - share) * left for share in shares)


class Router(nnx.Module):
    """Logits of tokens: `outputs` numbers a token, or one number by each of `outputs` routers.

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

    main: the routers that score. aux: expert-choice's auxiliary routers, trained on their own to
    predict the choice. bias: token-choice's balancing bias, moved by the train step alone.
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
    count: int,
    eligible: Bool[Array, "b n"] | None,
    fillers_last: bool,
) -> tuple[Int[Array, "b c"], Bool[Array, "b c"] | None]:
    """The `count` eligible candidates with the highest scores, in ascending order of position.

    Of tied ones (see `TIE`) the earlier positions.

    Where fewer are eligible, fillers take the slots that are left and `valid` marks them False;
    they stand in order too, or after all others with `fillers_last`. Indices are distinct.

    Raises:
        ValueError: `count` exceeds the number of candidates.
    """
    n = scores.shape[1]
    rule = f"a recursion has only the {n} tokens that the one before kept"
    check(0 < count <= n, "counts", count, rule, "Use non-increasing capacities")
    scores = jax.lax.stop_gradient(scores)
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if eligible is None:
        return _first(_best(scores, count), places, count), None
    best = _best(jnp.where(eligible, scores, -jnp.inf), count)
    if fillers_last:
        ordered = _first(best, jnp.where(eligible, places, places + n), count)
        return jnp.where(ordered < n, ordered, ordered - n), ordered < n
    index = _first(best, places, count)
    return index, jnp.take_along_axis(eligible, index, axis=1)


def _first(chosen: Bool[Array, "b n"], order: Int[Array, "b n"], count: int) -> Int[Array, "b c"]:
    """The `order` (below 2n) of the `count` chosen candidates, ascending."""
    behind = 2 * chosen.shape[1]
    return jnp.sort(jnp.where(chosen, order, behind), axis=1)[:, :count]


def _best(scores: Float[Array, "b n"], count: int) -> Bool[Array, "b n"]:
    """Which candidates have the `count` highest scores; of tied ones the earlier.

    Two tokens with equal hidden states have scores that rounding, and so the compiler, tells
    apart. Scores within `TIE` of the lowest one that is chosen therefore count as equal to it.
    A sort, because it stays on the devices that hold the rows; `lax.top_k` gathers them all.
    """
    # NaN would make every comparison false, and the slots would hold no places.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    ranked = -jnp.sort(-scores, axis=1)
    lowest = ranked[:, count - 1 : count]
    margin = tie_margin(ranked[:, :1], lowest)
    sure = scores > lowest + margin
    tied = (scores >= lowest - margin) & ~sure
    left = count - jnp.sum(sure, axis=1, keepdims=True)
    return sure | (tied & (jnp.cumsum(tied, axis=1) <= left))


def tie_margin(best: Float[Array, "*b"], lowest: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """How far a score may lie from the lowest chosen one and count as equal; 0 at infinities.

    best: the row's highest score, for the size of the terms that were rounded.
    """
    unit = TIE * float(jnp.finfo(jnp.float32).eps)
    margin = unit * jnp.maximum(jnp.abs(best), jnp.abs(lowest))
    return jnp.where(jnp.isfinite(margin), margin, 0.0)
