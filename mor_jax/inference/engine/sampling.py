"""The next token of every row from its logits: penalties, temperature, cuts and the draw.

Everything runs on the device with static shapes. A row's token depends on its own logits, settings
and position only. Nothing is sorted: a cut is a value that is found by bisection, because a sort of
a whole vocabulary costs more on a CPU than all the rest together.
"""

import dataclasses
import secrets
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt

from mor_jax.inference.engine.request import MAX_LOGPROBS, Request, SamplingParams
from mor_jax.types import Array, Bool, Float, Int

# Tokens of a block, over which sums and largest values are kept: about the root of a vocabulary.
_BLOCK = 256

# Settings beyond these have no further effect, but would turn logits into infinities.
_SMALL, _LARGE = 1e-30, 1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The fields of `Sampling` for every row, as arrays [b]. top_k: 0 keeps all."""

    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    min_p: Float[Array, "b"]
    repetition_penalty: Float[Array, "b"]
    presence_penalty: Float[Array, "b"]
    frequency_penalty: Float[Array, "b"]
    seed: UInt[Array, "b"]

    @staticmethod
    def row(sampling: SamplingParams, seed: int | None = None) -> dict[str, np.generic]:
        """The numbers of one row by field, in the arrays' dtypes.

        seed: instead of that of `sampling`; where neither has one, one is drawn.
        """
        seed = sampling.seed if seed is None else seed

        def held(value: float) -> np.float32:
            return np.float32(min(max(value, _SMALL), _LARGE))

        return {
            "temperature": held(sampling.temperature) if sampling.temperature else np.float32(0),
            "top_k": np.int32(min(sampling.top_k or 0, 2**31 - 1)),
            "top_p": held(sampling.top_p),
            "min_p": np.float32(sampling.min_p),
            "repetition_penalty": held(sampling.repetition_penalty),
            "presence_penalty": np.float32(sampling.presence_penalty),
            "frequency_penalty": np.float32(sampling.frequency_penalty),
            "seed": np.uint32(secrets.randbits(32) if seed is None else seed),
        }

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "SamplingArrays":
        """One row each, as NumPy arrays; `row` fills a single one."""
        made = [cls.row(sampling) for sampling in rows]
        return cls(**{f.name: np.array([row[f.name] for row in made]) for f in _FIELDS})

    @classmethod
    def greedy(cls, rows: int) -> "SamplingArrays":
        """`rows` rows that take the best token: for slots that nobody uses."""
        return cls.of([SamplingParams(temperature=0.0, seed=0)] * rows)


_FIELDS = dataclasses.fields(SamplingArrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """What any row asks for, as scalars (booleans): the rest is not computed.

    penalties: any is set. draws: any row has a temperature. cuts: and top_k, top_p or min_p.
    logprobs: of the chosen tokens. alternatives: of the likeliest ones.
    """

    penalties: Bool[Array, ""] | bool
    draws: Bool[Array, ""] | bool
    cuts: Bool[Array, ""] | bool
    logprobs: Bool[Array, ""] | bool
    alternatives: Bool[Array, ""] | bool

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "SamplingFeatures":
        """What these requests ask for together, as NumPy booleans."""
        rows = [request.sampling for request in requests]
        drawn = [row for row in rows if row.temperature > 0]
        return cls(
            penalties=np.bool_(any(_penalised(row) for row in rows)),
            draws=np.bool_(bool(drawn)),
            cuts=np.bool_(any(_cut(row) for row in drawn)),
            logprobs=np.bool_(any(request.logprobs is not None for request in requests)),
            alternatives=np.bool_(any(request.logprobs for request in requests)),
        )


def _penalised(row: SamplingParams) -> bool:
    penalties = (row.repetition_penalty - 1, row.presence_penalty, row.frequency_penalty)
    return any(penalties)


def _cut(row: SamplingParams) -> bool:
    return row.top_k is not None or row.top_p < 1 or row.min_p > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """token: -1 where the logits were not numbers.

    logprob: natural, under the model's own distribution; 0 unless wanted. top_ids, top_logprobs:
    the `MAX_LOGPROBS` likeliest tokens, best first, of equal ones the lower number first; -1 and
    -inf unless wanted or beyond the vocabulary.
    """

    token: Int[Array, "b"]
    logprob: Float[Array, "b"]
    top_ids: Int[Array, "b top"]
    top_logprobs: Float[Array, "b top"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PenaltyState:
    """What penalties look at. said: times that each token occurs in the row's answer so far.

    heard: whether it occurs in the prompt.
    """

    output_counts: Int[Array, "b v"]
    in_prompt: Bool[Array, "b v"]


def sample(
    logits: Float[Array, "b v"],
    settings: SamplingArrays,
    position: Int[Array, "b"],
    want: SamplingFeatures,
    before: PenaltyState | None = None,
) -> Sampled:
    """The next token of every row.

    position: number of the token within its sequence; with the row's seed it decides the draw, so
    that a request's tokens do not depend on the rows beside it. before: None where there can be no
    penalties. Equal logits share their fate: a cut keeps all that are as good as the last one kept.
    """
    logits = logits.astype(jnp.float32)
    best = jnp.max(logits, axis=1)

    def choose(used: Float[Array, "b v"]) -> Int[Array, "b"]:
        greedy = _first_best(used)
        return jax.lax.cond(
            want.draws,
            lambda: jnp.where(
                settings.temperature > 0, _draw(used, settings, position, want.cuts), greedy
            ),
            lambda: greedy,
        )

    if before is None:
        token = choose(logits)
    else:
        # Each branch goes on to its tokens: logits as a result would be copied in every step.
        token = jax.lax.cond(
            want.penalties,
            lambda: choose(_penalise(logits, settings, before)),
            lambda: choose(logits),
        )
    # NaN anywhere, an infinity, or no token at all.
    fine = jnp.isfinite(best)
    asked = jnp.logical_or(want.logprobs, want.alternatives)
    scale = jax.lax.cond(
        asked,
        lambda: best + jnp.log(jnp.sum(jnp.exp(logits - best[:, None]), axis=1)),
        lambda: best,
    )
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    logprob = jnp.where(asked, chosen - scale, 0.0)
    ids, values = jax.lax.cond(
        want.alternatives, lambda: _alternatives(logits), lambda: _none(logits.shape[0])
    )
    return Sampled(jnp.where(fine, token, -1), logprob, ids, values - scale[:, None])


def _penalise(
    logits: Float[Array, "b v"], settings: SamplingArrays, before: PenaltyState
) -> Float[Array, "b v"]:
    said, repetition = before.output_counts > 0, settings.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = jnp.where(said | before.in_prompt, scaled, logits)
    out = out - jnp.where(said, settings.presence_penalty[:, None], 0.0)
    out = out - settings.frequency_penalty[:, None] * before.output_counts.astype(jnp.float32)
    # -inf stays: a token that the model rules out must not come back.
    return jnp.where(jnp.isneginf(logits), logits, jnp.clip(out, -_LARGE, _LARGE))


def _blocks(x: Float[Array, "b v"], fill: float) -> Float[Array, "b blocks block"]:
    """Blocks of neighbouring tokens; the last one is filled up."""
    missing = -x.shape[1] % _BLOCK
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
    return x.reshape(x.shape[0], -1, _BLOCK)


def _block(x: Float[Array, "b blocks block"], index: Int[Array, "b"]) -> Float[Array, "b block"]:
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _first_best(logits: Float[Array, "b v"]) -> Int[Array, "b"]:
    """The best token; of equal ones the first. Faster than an argmax over everything."""
    blocks = _blocks(logits, -jnp.inf)
    row = jnp.argmax(jnp.max(blocks, axis=2), axis=1)
    place = row * _BLOCK + jnp.argmax(_block(blocks, row), axis=1)
    return jnp.minimum(place, logits.shape[1] - 1).astype(jnp.int32)


def _draw(
    logits: Float[Array, "b v"],
    settings: SamplingArrays,
    position: Int[Array, "b"],
    cuts: Bool[Array, ""] | bool,
) -> Int[Array, "b"]:
    """A token of the tempered and cut distribution, by the inverse of its cumulative sum."""
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    tempered = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature
    weight = jax.lax.cond(cuts, lambda: _cut_off(tempered, settings), lambda: jnp.exp(tempered))
    blocks = _blocks(weight, 0.0)
    upto = jnp.cumsum(jnp.sum(blocks, axis=2), axis=1)
    aim = _uniform(settings.seed, position)[:, None] * upto[:, -1:]
    # The first sum above the aim: its own part is above 0, so nothing that was cut can come out.
    row = jnp.argmax(upto > aim, axis=1)
    below = jnp.where(row > 0, jnp.take_along_axis(upto, row[:, None] - 1, axis=1)[:, 0], 0.0)
    inside = _block(blocks, row)
    passed = jnp.cumsum(inside, axis=1) > aim - below[:, None]
    # Rounding may leave the aim above the block's own sum: then it is the last token with weight.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=1)
    place = row * _BLOCK + jnp.where(passed[:, -1], jnp.argmax(passed, axis=1), last)
    return jnp.minimum(place, logits.shape[1] - 1).astype(jnp.int32)


def _uniform(seed: UInt[Array, "b"], position: Int[Array, "b"]) -> Float[Array, "b"]:
    """One number in [0, 1) for each row, from its seed and position alone."""

    def one(seed: Array, position: Array) -> Array:
        # Named, so that a default chosen elsewhere does not change what a seed means.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.uniform(key)

    return jax.vmap(one)(seed, position)


def _cut_off(tempered: Float[Array, "b v"], settings: SamplingArrays) -> Float[Array, "b v"]:
    """exp of the logits (largest: 0) where top_k, top_p and min_p keep them, else 0."""
    v = tempered.shape[1]
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, v), v)
    lowest = jax.lax.cond(
        jnp.any(k < v), lambda: _kth_best(tempered, k), lambda: jnp.full(k.shape, -jnp.inf)
    )
    weight = jnp.where(tempered >= lowest[:, None], jnp.exp(tempered), 0.0)
    least = jax.lax.cond(
        jnp.any(settings.top_p < 1),
        lambda: _nucleus(weight, settings.top_p),
        lambda: jnp.zeros(k.shape),
    )
    least = jnp.maximum(jnp.where(settings.top_p < 1, least, 0.0), settings.min_p)
    return jnp.where(weight >= least[:, None], weight, 0.0)


def _kth_best(x: Float[Array, "b v"], k: Int[Array, "b"]) -> Float[Array, "b"]:
    """A value that at least k numbers of each row reach, and no more than ties allow."""

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        # The mean of two integers, without their sum.
        middle = (low & high) + ((low ^ high) >> 1)
        # Exact: a vocabulary is far below 2**24.
        count = jnp.sum(jnp.where(x >= _ordered(middle)[:, None], 1.0, 0.0), axis=1)
        enough, exact = count >= k, count == k
        going = high - 1 > low
        return (
            jnp.where(going & enough, middle, low),
            jnp.where(going & exact, middle + 1, jnp.where(going & ~enough, middle, high)),
        )

    def unsettled(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return jnp.any(state[1] - 1 > state[0])

    # Between all and none; the largest is 0 here.
    low = jnp.full(k.shape, _bits(jnp.float32(-jnp.inf)))
    high = jnp.full(k.shape, 1, jnp.int32)
    return _ordered(jax.lax.while_loop(unsettled, step, (low, high))[0])


def _nucleus(weight: Float[Array, "b v"], share: Float[Array, "b"]) -> Float[Array, "b"]:
    """The largest value such that the numbers from it on make up `share` of each row's sum."""
    aim = share * jnp.sum(weight, axis=1)

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = low + (high - low) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = jnp.sum(jnp.where(weight >= value, weight, 0.0), axis=1) >= aim
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # Numbers from 0 to 1 are ordered as their bits are; the best token's is 1.
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    state = (jnp.zeros(share.shape, jnp.int32), jnp.full(share.shape, one + 1))
    low, _ = jax.lax.fori_loop(0, 31, step, state)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _bits(x: Array) -> Array:
    """Integers in the order of the numbers; its own inverse but for the type."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _ordered(bits: Int[Array, "b"]) -> Float[Array, "b"]:
    """The numbers whose order `_bits` gives."""
    bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _alternatives(logits: Float[Array, "b v"]) -> tuple[Int[Array, "b top"], Float[Array, "b top"]]:
    values, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - ids.shape[1]))
    return (
        jnp.pad(ids.astype(jnp.int32), missing, constant_values=-1),
        jnp.pad(values, missing, constant_values=-jnp.inf),
    )


def _none(rows: int) -> tuple[Int[Array, "b top"], Float[Array, "b top"]]:
    shape = (rows, MAX_LOGPROBS)
    return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf)
