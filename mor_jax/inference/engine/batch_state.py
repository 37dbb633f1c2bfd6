"""Device state of the running sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.inference.engine.request import Request
from mor_jax.inference.engine.sampling import SamplingArrays, SamplingFeatures
from mor_jax.models.decode.paged_cache import BlockTables, KVCacheSpec
from mor_jax.models.decode.routed_decode import TokenState
from mor_jax.types import Array, Bool, Int

IDLE, ENTERING, IN_FLIGHT = 0, 1, 2
"""Phases of a slot: no work; a token is about to enter the first layer; a token is in the block.

In a model without routers one decode step runs all layers, so no slot is ever `IN_FLIGHT`.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """One row for each slot, and a last one for padding.

    token, position: the token that is being processed. tokens_left: tokens that may still be
    sampled. prefilled: prompt tokens whose keys and values are stored. counts: entries of the KV
    lists in the block's pool. token_state: the token's progress through the recursions; None for
    models without routers. output_counts, in_prompt: how often each token occurs in the output, and
    whether it occurs in the prompt, for penalties. stop_at_eos: an EOS token ends the sequence.
    """

    phase: Int[Array, "s"]
    token: Int[Array, "s"]
    position: Int[Array, "s"]
    tokens_left: Int[Array, "s"]
    prefilled: Int[Array, "s"]
    counts: Int[Array, "s lists"]
    token_state: TokenState | None
    settings: SamplingArrays
    output_counts: Int[Array, "s v"]
    in_prompt: Bool[Array, "s v"]
    stop_at_eos: Bool[Array, "s"]

    @classmethod
    def empty(cls, spec: KVCacheSpec, number: int) -> "BatchState":
        """`number` empty slots."""
        cfg, s = spec.cfg, number + 1

        def zeros() -> Array:
            # Separate arrays: all of them are donated to the compiled functions.
            return jnp.zeros(s, jnp.int32)

        token_state = None
        if cfg.router.kind != "none":
            token_state = jax.tree.map(jnp.copy, TokenState.empty(cfg, s))
        return cls(
            phase=zeros(),
            token=zeros(),
            position=zeros(),
            tokens_left=zeros(),
            prefilled=zeros(),
            counts=jnp.zeros((s, spec.lists), jnp.int32),
            token_state=token_state,
            settings=jax.tree.map(jnp.asarray, SamplingArrays.greedy(s)),
            output_counts=jnp.zeros((s, cfg.vocab_size), jnp.int16),
            in_prompt=jnp.zeros((s, cfg.vocab_size), bool),
            stop_at_eos=jnp.zeros(s, bool),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceBlocks:
    """The pages that the host has allocated. capacity_tokens: entries that each list may hold."""

    tables: BlockTables
    capacity_tokens: Int[Array, "s lists"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """A sequence whose tokens are prefilled, except for the last. Fields as in `BatchState`."""

    slot: Int[Array, ""] | np.int32
    token: Int[Array, ""] | np.int32
    position: Int[Array, ""] | np.int32
    tokens_left: Int[Array, ""] | np.int32
    settings: dict[str, np.generic | Array]
    output_counts: Int[Array, "v"] | np.ndarray
    in_prompt: Bool[Array, "v"] | np.ndarray
    stop_at_eos: Bool[Array, ""] | np.bool_

    @classmethod
    def of(
        cls, request: Request, slot: int, output_tokens: list[int], seed: int, v: int
    ) -> "Admission":
        """For a request that resumes after `output_tokens`. v: size of the vocabulary."""
        tokens = [*request.prompt, *output_tokens]
        in_prompt = np.zeros(v, bool)
        in_prompt[list(request.prompt)] = True
        output_counts = np.bincount(np.asarray(output_tokens, np.int64), minlength=v)
        return cls(
            slot=np.int32(slot),
            token=np.int32(tokens[-1]),
            position=np.int32(len(tokens) - 1),
            tokens_left=np.int32(request.max_tokens - len(output_tokens)),
            settings=SamplingArrays.row(request.sampling, seed),
            output_counts=np.minimum(output_counts, np.iinfo(np.int16).max).astype(np.int16),
            in_prompt=in_prompt,
            stop_at_eos=np.bool_(not request.ignore_eos),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeInput:
    """Sequences of a decode step.

    rows: slot of each; distinct, except for padding. features: what any of them needs.
    """

    rows: Int[Array, "n"] | np.ndarray
    valid: Bool[Array, "n"] | np.ndarray
    features: SamplingFeatures


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillInput:
    """A prompt chunk: slot, first position, and `tokens`, of which the first `count` are valid."""

    slot: Int[Array, ""] | np.int32
    start: Int[Array, ""] | np.int32
    count: Int[Array, ""] | np.int32
    tokens: Int[Array, "n"] | np.ndarray


def admit(state: BatchState, admission: Admission) -> BatchState:
    """Starts to decode a sequence, unless its prefill turned out to be incomplete."""
    slot = admission.slot
    prefill_complete = (state.prefilled[slot] == admission.position) | (admission.position == 0)
    settings = SamplingArrays(
        **{
            name: getattr(state.settings, name).at[slot].set(value)
            for name, value in admission.settings.items()
        }
    )
    # A prompt of one token has no prefill, so its lists are emptied here.
    counts = jnp.where(admission.position == 0, 0, state.counts[slot])
    return dataclasses.replace(
        state,
        phase=state.phase.at[slot].set(jnp.where(prefill_complete, ENTERING, IDLE)),
        token=state.token.at[slot].set(admission.token),
        position=state.position.at[slot].set(admission.position),
        tokens_left=state.tokens_left.at[slot].set(admission.tokens_left),
        counts=state.counts.at[slot].set(counts),
        settings=settings,
        output_counts=state.output_counts.at[slot].set(admission.output_counts),
        in_prompt=state.in_prompt.at[slot].set(admission.in_prompt),
        stop_at_eos=state.stop_at_eos.at[slot].set(admission.stop_at_eos),
    )
