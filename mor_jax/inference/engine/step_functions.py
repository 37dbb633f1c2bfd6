"""The engine's compiled functions: a decode step, the prefill of a prompt chunk, an admission.

A decode step of a routed model calls the shared block once, on sequences at different recursions
(continuous depth-wise batching). Tokens that exit the block go through the last layer and are
sampled in the same step. The new tokens go through the first layer, so that every sequence has work
for the block in the next step.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.inference.engine.batch_state import (
    ENTERING,
    IDLE,
    IN_FLIGHT,
    BatchState,
    DecodeInput,
    PrefillInput,
    SequenceBlocks,
    admit,
)
from mor_jax.inference.engine.request import MAX_LOGPROBS
from mor_jax.inference.engine.sampling import PenaltyState, SamplerOutput, SamplingFeatures, sample
from mor_jax.models.decode import routed_decode, routed_prefill, vanilla
from mor_jax.models.decode.batch import DecodeBatch, PrefillChunk
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import Weights, logits
from mor_jax.models.decode.paged_cache import Cache, KVCacheSpec
from mor_jax.models.decode.routed_decode import KVEntry, TokenState
from mor_jax.models.layers.token_gather import where_tokens
from mor_jax.types import Array, Bool, Float, Int

CONTINUES, EOS, LENGTH, FAILED = 0, 1, 2, 3
"""State of a sequence after sampling: continues, EOS, `max_tokens` reached, logits not finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """Result of a decode step for its n sequences.

    sampled: the sequence has a new token, in `samples`. state: one of `CONTINUES` .. `FAILED`.
    depth: recursions of the token that predicted it. useful: the block computed a token of the
    sequence. stalled: the block should have, but the KV list is full. counts: entries of the KV
    lists after the step.
    """

    sampled: Bool[Array, "n"]
    samples: SamplerOutput
    state: Int[Array, "n"]
    depth: Int[Array, "n"]
    useful: Bool[Array, "n"]
    stalled: Bool[Array, "n"]
    counts: Int[Array, "n lists"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillOutput:
    """Result of the prefill of one prompt chunk; other fields as in `routed_prefill.Stored`.

    in_order: the chunk was the next one of its sequence. If False, an earlier chunk did not fit.
    required: entries that each list needs for the chunk to fit.
    """

    in_order: Bool[Array, ""]
    fits: Bool[Array, ""]
    counts: Int[Array, "lists"]
    required: Int[Array, "lists"]
    depth: Int[Array, "n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Transition:
    """Result of tokens that exit and enter the block: samples, token states, KV of the end layers.

    continuing: sequences that have a new token in the block.
    """

    sampled: SamplerOutput
    state: Int[Array, "n"]
    token_state: TokenState
    continuing: Bool[Array, "n"]
    last: KVEntry
    first: KVEntry


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The functions for one model; each batch size and chunk size is compiled separately.

    eos: token ids that end a text. pages_per_read: pages that attention reads at a time.
    group_tokens: prompt tokens that go through the layers at a time; smaller groups waste less on
    padding.
    """

    spec: KVCacheSpec
    eos: tuple[int, ...]
    thresholds: tuple[float, ...]
    pages_per_read: int
    group_tokens: int

    def compiled(self) -> "CompiledFunctions":
        """The jitted functions. Slots and cache are donated."""
        return CompiledFunctions(
            decode_step=jax.jit(self.decode_step, donate_argnums=(1, 2)),
            prefill=jax.jit(self.prefill, donate_argnums=(1, 2)),
            admit=jax.jit(admit, donate_argnums=0),
        )

    def decode_step(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        blocks: SequenceBlocks,
        inputs: DecodeInput,
    ) -> tuple[BatchState, Cache, StepOutput]:
        """One decode step of the sequences in `inputs`."""
        rows = DecodeBatch(inputs.rows, slots.position[inputs.rows], inputs.valid)
        if slots.token_state is None:
            return self._vanilla_step(weights, slots, cache, blocks, (rows, inputs.features))
        return self._routed_step(weights, slots, cache, blocks, (rows, inputs.features))

    def _vanilla_step(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        blocks: SequenceBlocks,
        inputs: tuple[DecodeBatch, SamplingFeatures],
    ) -> tuple[BatchState, Cache, StepOutput]:
        rows, features = inputs
        slot = rows.slot
        valid = rows.valid & (slots.phase[slot] == ENTERING)
        rows = dataclasses.replace(rows, valid=valid)
        decoder = self._decoder(weights, blocks)
        hidden, cache = vanilla.decode(decoder, cache, rows, slots.token[slot])
        sampled, state = self._sample(weights, slots, rows, hidden, features)
        counts = slots.counts[slot] + valid[:, None]
        zeros = jnp.zeros(slot.shape, jnp.int32)
        output = StepOutput(
            sampled=valid,
            samples=sampled,
            state=state,
            depth=zeros,
            useful=valid,
            stalled=jnp.zeros(slot.shape, bool),
            counts=counts,
        )
        return self._update_state(slots, rows, output, None), cache, output

    def _routed_step(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        blocks: SequenceBlocks,
        inputs: tuple[DecodeBatch, SamplingFeatures],
    ) -> tuple[BatchState, Cache, StepOutput]:
        rows, features = inputs
        slot, cfg = rows.slot, self.spec.cfg
        assert slots.token_state is not None
        token_state = jax.tree.map(lambda x: x[slot], slots.token_state)
        decoder = self._decoder(weights, blocks)
        in_flight = rows.valid & (slots.phase[slot] == IN_FLIGHT)
        list_index = self.spec.list_of(token_state.recursion)
        list_lengths = jnp.take_along_axis(slots.counts[slot], list_index[:, None], axis=1)[:, 0]
        capacity = jnp.take_along_axis(blocks.capacity_tokens[slot], list_index[:, None], axis=1)[
            :, 0
        ]
        needs_block = in_flight & routed_decode.needs_block(
            cfg, token_state.taken, token_state.recursion
        )
        writes = routed_decode.writes_list(cfg, needs_block, token_state.recursion)
        stalled = writes & (list_lengths >= capacity)
        advancing = in_flight & ~stalled
        useful = advancing & needs_block
        advancing_rows = dataclasses.replace(rows, valid=advancing)
        token_state, exits, cache = routed_decode.advance(
            decoder, cache, advancing_rows, token_state, list_lengths
        )
        added = (writes & advancing)[:, None] & (
            jnp.arange(self.spec.lists)[None] == list_index[:, None]
        )
        counts = slots.counts[slot] + added
        entering = rows.valid & (slots.phase[slot] == ENTERING)
        depth = token_state.depth
        transition = self._transition(
            decoder, slots, cache, rows, (exits, entering, token_state, features)
        )
        exiting = dataclasses.replace(rows, valid=exits)
        cache = routed_decode.store(decoder, cache, exiting, transition.last, 1)
        next_rows = DecodeBatch(slot, rows.position + exits, transition.continuing)
        cache = routed_decode.store(decoder, cache, next_rows, transition.first, 0)
        output = StepOutput(
            sampled=exits,
            samples=transition.sampled,
            state=transition.state,
            depth=depth,
            useful=useful,
            stalled=stalled,
            counts=counts,
        )
        return self._update_state(slots, rows, output, transition.token_state), cache, output

    def _transition(
        self,
        decoder: Decoder,
        slots: BatchState,
        cache: Cache,
        rows: DecodeBatch,
        what: tuple[Array, Array, TokenState, SamplingFeatures],
    ) -> _Transition:
        """Last layer, sampling and first layer for tokens that exit or enter the block.

        Their number is known on the device only, so there is one branch for each of a few sizes.
        """
        exits, entering, token_state, features = what
        n = rows.slot.shape[0]
        active = exits | entering
        count = jnp.sum(active, dtype=jnp.int32)
        order = jnp.argsort(~active, stable=True).astype(jnp.int32)
        sizes = _branch_sizes(n)
        none = KVEntry.empty(self.spec.cfg, n)
        unsampled = (_empty_samples(n), jnp.zeros(n, jnp.int32))
        unchanged = _Transition(*unsampled, token_state, jnp.zeros(n, bool), none, none)

        def branch(size: int) -> _Transition:
            if size == 0:
                return unchanged
            index = order[:size]
            part = DecodeBatch(rows.slot[index], rows.position[index], exits[index])
            hidden, last = routed_decode.leave(decoder, cache, part, token_state.x[index])
            sampled, state = self._sample(decoder.weights, slots, part, hidden, features)
            token = jnp.where(part.valid, sampled.token, slots.token[part.slot])
            continuing = entering[index] | (part.valid & (state == CONTINUES))
            next_rows = DecodeBatch(part.slot, part.position + part.valid, continuing)
            new, first = routed_decode.enter(decoder, cache, next_rows, jnp.maximum(token, 0))
            old = jax.tree.map(lambda x: x[index], token_state)
            new = jax.tree.map(lambda a, b: where_tokens(continuing, a, b), new, old)
            result = _Transition(sampled, state, new, continuing, last, first)
            return jax.tree.map(lambda array, x: array.at[index].set(x), unchanged, result)

        branch_index = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), count, side="left")
        return jax.lax.switch(branch_index, [partial(branch, size) for size in sizes])

    def _sample(
        self,
        weights: Weights,
        slots: BatchState,
        rows: DecodeBatch,
        hidden: Float[Array, "n d"],
        features: SamplingFeatures,
    ) -> tuple[SamplerOutput, Int[Array, "n"]]:
        """A token for each sequence, and the sequence's state after it."""
        slot = rows.slot
        settings = jax.tree.map(lambda x: x[slot], slots.settings)
        penalty_state = PenaltyState(slots.output_counts[slot], slots.in_prompt[slot])
        scores = logits(weights, hidden)
        sampled = sample(scores, settings, rows.position + 1, features, penalty_state)
        is_eos = jnp.any(sampled.token[:, None] == jnp.asarray(self.eos, jnp.int32)[None], axis=1)
        state = jnp.where(slots.tokens_left[slot] <= 1, LENGTH, CONTINUES)
        state = jnp.where(is_eos & slots.stop_at_eos[slot], EOS, state)
        return sampled, jnp.where(sampled.token < 0, FAILED, state)

    def _update_state(
        self,
        slots: BatchState,
        rows: DecodeBatch,
        output: StepOutput,
        token_state: TokenState | None,
    ) -> BatchState:
        """The slots after a decode step."""
        slot, sampled = rows.slot, output.sampled
        resting = IN_FLIGHT if token_state is not None else ENTERING
        entered = sampled | (slots.phase[slot] == ENTERING)
        phase = jnp.where(rows.valid & entered, resting, slots.phase[slot])
        phase = jnp.where(sampled & (output.state != CONTINUES), IDLE, phase)
        token = jnp.where(sampled, output.samples.token, slots.token[slot])
        # Padding rows all point to the last slot, whose contents are never read.
        output_counts = slots.output_counts.at[slot, jnp.maximum(token, 0)].add(
            sampled.astype(jnp.int16)
        )
        new = dataclasses.replace(
            slots,
            phase=slots.phase.at[slot].set(phase),
            token=slots.token.at[slot].set(token),
            position=slots.position.at[slot].add(sampled.astype(jnp.int32)),
            tokens_left=slots.tokens_left.at[slot].add(-sampled.astype(jnp.int32)),
            counts=slots.counts.at[slot].set(output.counts),
            output_counts=output_counts,
        )
        if token_state is None or slots.token_state is None:
            return new
        new_token_state = jax.tree.map(
            lambda array, x: array.at[slot].set(x), slots.token_state, token_state
        )
        return dataclasses.replace(new, token_state=new_token_state)

    def _decoder(self, weights: Weights, blocks: SequenceBlocks) -> Decoder:
        thresholds = jnp.asarray(self.thresholds, jnp.float32)
        return Decoder(self.spec, weights, blocks.tables, thresholds, self.pages_per_read)

    def prefill(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        blocks: SequenceBlocks,
        inputs: PrefillInput,
    ) -> tuple[BatchState, Cache, PrefillOutput]:
        """Writes the keys and values of a prompt chunk; `start` 0 marks a sequence's first one."""
        slot, n = inputs.slot, inputs.tokens.shape[0]
        first = inputs.start == 0
        in_order = first | (slots.prefilled[slot] == inputs.start)
        counts = jnp.where(first, 0, slots.counts[slot])
        offset = jnp.arange(n, dtype=jnp.int32)
        valid = in_order & (offset < inputs.count)
        rows = PrefillChunk(slot, inputs.start + offset, valid)
        decoder = self._decoder(weights, blocks)
        if slots.token_state is None:
            cache = self._vanilla_prefill(decoder, cache, rows, inputs)
            new_counts = counts + jnp.where(in_order, inputs.count, 0)
            zeros = jnp.zeros(n, jnp.int32)
            output = PrefillOutput(in_order, jnp.array(True), new_counts, new_counts, zeros)
        else:
            group_tokens = max(min(8, n), min(self.group_tokens, n // 4))
            lists = (counts, blocks.capacity_tokens[slot])
            stored, cache = routed_prefill.prefill(
                decoder, cache, rows, inputs.tokens, lists, group_tokens
            )
            output = PrefillOutput(
                in_order, stored.fits, stored.counts, stored.wanted, stored.depth
            )
        prefilled_before = jnp.where(first, 0, slots.prefilled[slot])
        prefilled = prefilled_before + jnp.where(in_order & output.fits, inputs.count, 0)
        slots = dataclasses.replace(
            slots,
            prefilled=slots.prefilled.at[slot].set(prefilled),
            counts=slots.counts.at[slot].set(output.counts),
        )
        return slots, cache, output

    def _vanilla_prefill(
        self, decoder: Decoder, cache: Cache, rows: PrefillChunk, inputs: PrefillInput
    ) -> Cache:
        """Runs all layers on groups of the chunk's tokens; groups of padding are skipped."""
        n = inputs.tokens.shape[0]
        group_tokens = min(self.group_tokens, n)
        if group_tokens == n:
            return vanilla.prefill(decoder, cache, rows, inputs.tokens)
        rounds = jnp.where(rows.valid[0], (inputs.count + group_tokens - 1) // group_tokens, 0)

        def group_slice(x: Array, i: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(
                jnp.pad(x, (0, -n % group_tokens)), i * group_tokens, group_tokens
            )

        def store(i: Array, cache: Cache) -> Cache:
            part = PrefillChunk(
                rows.slot, group_slice(rows.position, i), group_slice(rows.valid, i)
            )
            return vanilla.prefill(decoder, cache, part, group_slice(inputs.tokens, i))

        return jax.lax.fori_loop(0, rounds, store, cache)


@dataclasses.dataclass(frozen=True)
class CompiledFunctions:
    """`StepFunctions.decode_step`, `StepFunctions.prefill` and `batch_state.admit`, jitted."""

    decode_step: "jax.stages.Wrapped"
    prefill: "jax.stages.Wrapped"
    admit: "jax.stages.Wrapped"


def _branch_sizes(n: int) -> list[int]:
    """Sizes of the branches for up to n rows. Below 8 rows time hardly falls."""
    parts = (-(-n * eighths // 8) for eighths in (2, 3, 4, 6))
    return [0, *sorted({part for part in parts if part >= 8} | {n})]


def _empty_samples(n: int) -> SamplerOutput:
    return SamplerOutput(
        token=jnp.zeros(n, jnp.int32),
        logprob=jnp.zeros(n),
        top_ids=jnp.full((n, MAX_LOGPROBS), -1, jnp.int32),
        top_logprobs=jnp.full((n, MAX_LOGPROBS), -jnp.inf),
    )
