"""Samples the next token of every sequence: penalties, temperature, truncation, draw.

Everything runs on the device with static shapes. A sequence's token depends on its own logits,
settings and position only. Nothing is sorted: the thresholds of top_k and top_p are found by
bisection, because sorting a vocabulary costs more on a CPU than everything else together.
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

# Tokens of a block for partial sums and maxima: about the square root of a vocabulary.
_BLOCK = 256

# Values beyond these have no further effect, but would turn logits into infinities.
_SMALL, _LARGE = 1e-30, 1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The fields of `SamplingParams` for every row, as arrays [b]. top_k: 0 keeps all tokens."""

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
        """The values of one row by field, in the arrays' dtypes.

        seed: replaces that of `sampling`; if both are None, one is drawn.
        """
        seed = sampling.seed if seed is None else seed

        def clipped(value: float) -> np.float32:
            return np.float32(min(max(value, _SMALL), _LARGE))

        return {
            "temperature": clipped(sampling.temperature) if sampling.temperature else np.float32(0),
            "top_k": np.int32(min(sampling.top_k or 0, 2**31 - 1)),
            "top_p": clipped(sampling.top_p),
            "min_p": np.float32(sampling.min_p),
            "repetition_penalty": clipped(sampling.repetition_penalty),
            "presence_penalty": np.float32(sampling.presence_penalty),
            "frequency_penalty": np.float32(sampling.frequency_penalty),
            "seed": np.uint32(secrets.randbits(32) if seed is None else seed),
        }

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "SamplingArrays":
        """One row for each of `rows`, as NumPy arrays."""
        rows_by_field = [cls.row(sampling) for sampling in rows]
        return cls(**{f.name: np.array([row[f.name] for row in rows_by_field]) for f in _FIELDS})

    @classmethod
    def greedy(cls, rows: int) -> "SamplingArrays":
        """`rows` greedy rows, for empty slots."""
        return cls.of([SamplingParams(temperature=0.0, seed=0)] * rows)


_FIELDS = dataclasses.fields(SamplingArrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """What any row needs, as boolean scalars; everything else is skipped.

    penalties: any is set. random_sampling: any row has a temperature. truncation: any of these has
    top_k, top_p or min_p. logprobs: of the sampled tokens. alternatives: of the most likely ones.
    """

    penalties: Bool[Array, ""] | bool
    random_sampling: Bool[Array, ""] | bool
    truncation: Bool[Array, ""] | bool
    logprobs: Bool[Array, ""] | bool
    alternatives: Bool[Array, ""] | bool

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "SamplingFeatures":
        """The features that any of these requests needs, as NumPy booleans."""
        rows = [request.sampling for request in requests]
        random_rows = [row for row in rows if row.temperature > 0]
        return cls(
            penalties=np.bool_(any(_has_penalties(row) for row in rows)),
            random_sampling=np.bool_(bool(random_rows)),
            truncation=np.bool_(any(_truncates(row) for row in random_rows)),
            logprobs=np.bool_(any(request.logprobs is not None for request in requests)),
            alternatives=np.bool_(any(request.logprobs for request in requests)),
        )


def _has_penalties(row: SamplingParams) -> bool:
    penalties = (row.repetition_penalty - 1, row.presence_penalty, row.frequency_penalty)
    return any(penalties)


def _truncates(row: SamplingParams) -> bool:
    return row.top_k is not None or row.top_p < 1 or row.min_p > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerOutput:
    """Sampled tokens. token: -1 where the logits are not finite.

    logprob: natural logarithm under the model's own distribution; 0 unless requested.
    top_ids, top_logprobs: the `MAX_LOGPROBS` most likely tokens, best first, ties by lower id; -1
    and -inf unless requested, or beyond the vocabulary.
    """

    token: Int[Array, "b"]
    logprob: Float[Array, "b"]
    top_ids: Int[Array, "b top"]
    top_logprobs: Float[Array, "b top"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PenaltyState:
    """Token statistics for penalties.

    output_counts: occurrences of each token in the output. in_prompt: whether it is in the prompt.
    """

    output_counts: Int[Array, "b v"]
    in_prompt: Bool[Array, "b v"]


def sample(
    logits: Float[Array, "b v"],
    settings: SamplingArrays,
    position: Int[Array, "b"],
    features: SamplingFeatures,
    penalty_state: PenaltyState | None = None,
) -> SamplerOutput:
    """Samples the next token of every row.

    position: of the token in its sequence. Seed and position alone determine the random number, so
    a request's tokens do not depend on the rest of the batch. penalty_state: None without
    penalties. Ties are kept together: truncation keeps every token as likely as the last one kept.
    """
    logits = logits.astype(jnp.float32)
    best = jnp.max(logits, axis=1)

    def choose(logits: Float[Array, "b v"]) -> Int[Array, "b"]:
        greedy = _first_best(logits)
        return jax.lax.cond(
            features.random_sampling,
            lambda: jnp.where(
                settings.temperature > 0,
                _draw(logits, settings, position, features.truncation),
                greedy,
            ),
            lambda: greedy,
        )

    if penalty_state is None:
        token = choose(logits)
    else:
        # Each branch returns tokens: returning logits would copy them in every step.
        token = jax.lax.cond(
            features.penalties,
            lambda: choose(_penalise(logits, settings, penalty_state)),
            lambda: choose(logits),
        )
    # False for a NaN anywhere, an infinity, or a row without any possible token.
    finite = jnp.isfinite(best)
    needs_logprobs = jnp.logical_or(features.logprobs, features.alternatives)
    scale = jax.lax.cond(
        needs_logprobs,
        lambda: best + jnp.log(jnp.sum(jnp.exp(logits - best[:, None]), axis=1)),
        lambda: best,
    )
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    logprob = jnp.where(needs_logprobs, chosen - scale, 0.0)
    ids, values = jax.lax.cond(
        features.alternatives,
        lambda: _alternatives(logits),
        lambda: _no_alternatives(logits.shape[0]),
    )
    return SamplerOutput(jnp.where(finite, token, -1), logprob, ids, values - scale[:, None])


def _penalise(
    logits: Float[Array, "b v"], settings: SamplingArrays, penalty_state: PenaltyState
) -> Float[Array, "b v"]:
    in_output, repetition = penalty_state.output_counts > 0, settings.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    out = jnp.where(in_output | penalty_state.in_prompt, scaled, logits)
    out = out - jnp.where(in_output, settings.presence_penalty[:, None], 0.0)
    out = out - settings.frequency_penalty[:, None] * penalty_state.output_counts.astype(
        jnp.float32
    )
    # -inf stays: a token that the model excludes must not come back.
    return jnp.where(jnp.isneginf(logits), logits, jnp.clip(out, -_LARGE, _LARGE))


def _blocks(x: Float[Array, "b v"], fill: float) -> Float[Array, "b blocks block"]:
    """Splits the vocabulary into blocks; the last one is padded with `fill`."""
    padding = -x.shape[1] % _BLOCK
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill)
    return x.reshape(x.shape[0], -1, _BLOCK)


def _block(x: Float[Array, "b blocks block"], index: Int[Array, "b"]) -> Float[Array, "b block"]:
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _first_best(logits: Float[Array, "b v"]) -> Int[Array, "b"]:
    """The best token, the first one on ties. Faster than one argmax over the vocabulary."""
    blocks = _blocks(logits, -jnp.inf)
    row = jnp.argmax(jnp.max(blocks, axis=2), axis=1)
    token = row * _BLOCK + jnp.argmax(_block(blocks, row), axis=1)
    return jnp.minimum(token, logits.shape[1] - 1).astype(jnp.int32)


def _draw(
    logits: Float[Array, "b v"],
    settings: SamplingArrays,
    position: Int[Array, "b"],
    truncation: Bool[Array, ""] | bool,
) -> Int[Array, "b"]:
    """Draws from the tempered and truncated distribution by inverting its cumulative sum."""
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    tempered = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature
    weight = jax.lax.cond(
        truncation, lambda: _truncate(tempered, settings), lambda: jnp.exp(tempered)
    )
    blocks = _blocks(weight, 0.0)
    cumulative = jnp.cumsum(jnp.sum(blocks, axis=2), axis=1)
    target = _uniform(settings.seed, position)[:, None] * cumulative[:, -1:]
    # The first sum above the target: its own part is above 0, so no truncated token is drawn.
    row = jnp.argmax(cumulative > target, axis=1)
    below = jnp.where(row > 0, jnp.take_along_axis(cumulative, row[:, None] - 1, axis=1)[:, 0], 0.0)
    inside = _block(blocks, row)
    passed = jnp.cumsum(inside, axis=1) > target - below[:, None]
    # Rounding may put the target above the block's sum; then take the last token with weight.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=1)
    token = row * _BLOCK + jnp.where(passed[:, -1], jnp.argmax(passed, axis=1), last)
    return jnp.minimum(token, logits.shape[1] - 1).astype(jnp.int32)


def _uniform(seed: UInt[Array, "b"], position: Int[Array, "b"]) -> Float[Array, "b"]:
    """A uniform number in [0, 1) for each row, from its seed and position alone."""

    def one(seed: Array, position: Array) -> Array:
        # Explicit, so that JAX's default implementation does not change what a seed means.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.uniform(key)

    return jax.vmap(one)(seed, position)


def _truncate(tempered: Float[Array, "b v"], settings: SamplingArrays) -> Float[Array, "b v"]:
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
    """The k-th largest value of each row."""

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        # The mean of two integers, without their sum.
        middle = (low & high) + ((low ^ high) >> 1)
        # Exact: a vocabulary is far below 2**24.
        count = jnp.sum(jnp.where(x >= _ordered(middle)[:, None], 1.0, 0.0), axis=1)
        enough, exact = count >= k, count == k
        active = high - 1 > low
        return (
            jnp.where(active & enough, middle, low),
            jnp.where(active & exact, middle + 1, jnp.where(active & ~enough, middle, high)),
        )

    def unsettled(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return jnp.any(state[1] - 1 > state[0])

    # Between all and none; the largest is 0 here.
    low = jnp.full(k.shape, _bits(jnp.float32(-jnp.inf)))
    high = jnp.full(k.shape, 1, jnp.int32)
    return _ordered(jax.lax.while_loop(unsettled, step, (low, high))[0])


def _nucleus(weight: Float[Array, "b v"], probability: Float[Array, "b"]) -> Float[Array, "b"]:
    """The largest threshold for which the weights from it on sum to `probability` of the total."""
    target = probability * jnp.sum(weight, axis=1)

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = low + (high - low) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = jnp.sum(jnp.where(weight >= value, weight, 0.0), axis=1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # Floats from 0 to 1 have the order of their bits; the best token's weight is 1.
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    state = (jnp.zeros(probability.shape, jnp.int32), jnp.full(probability.shape, one + 1))
    low, _ = jax.lax.fori_loop(0, 31, step, state)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _bits(x: Array) -> Array:
    """Integers in the order of the floats; `_ordered` is the inverse."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _ordered(bits: Int[Array, "b"]) -> Float[Array, "b"]:
    """The floats that `_bits` maps to these integers."""
    bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _alternatives(logits: Float[Array, "b v"]) -> tuple[Int[Array, "b top"], Float[Array, "b top"]]:
    values, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    padding = ((0, 0), (0, MAX_LOGPROBS - ids.shape[1]))
    return (
        jnp.pad(ids.astype(jnp.int32), padding, constant_values=-1),
        jnp.pad(values, padding, constant_values=-jnp.inf),
    )


def _no_alternatives(rows: int) -> tuple[Int[Array, "b top"], Float[Array, "b top"]]:
    shape = (rows, MAX_LOGPROBS)
    return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf)
