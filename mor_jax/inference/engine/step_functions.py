"""The device's programs: one tick of decoding, a piece of a prompt, an admission.

A tick of a routed model is one call of the shared block on rows at whatever recursion they are.
Those that leave it go through the last layer and are sampled in the same tick, and their successors
through the first layer, so that every row has work for the block in the next one.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.inference.engine.batch_state import (
    ENTERS,
    FLIES,
    IDLE,
    BatchState,
    SequenceBlocks,
    admit,
)
from mor_jax.inference.engine.request import MAX_LOGPROBS
from mor_jax.inference.engine.sampling import PenaltyState, Sampled, SamplingFeatures, sample
from mor_jax.models.decode import routed_decode, routed_prefill, vanilla
from mor_jax.models.decode.batch import DecodeBatch, PrefillChunk
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import Weights, logits
from mor_jax.models.decode.paged_cache import Cache, KVCacheSpec
from mor_jax.models.decode.routed_decode import KVEntry, TokenState
from mor_jax.models.layers.token_gather import where_tokens
from mor_jax.types import Array, Bool, Float, Int

GOES_ON, ENDED, FULL, FAILED = 0, 1, 2, 3
"""What a sampled token means for its sequence: end of text, all tokens used, logits not numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a tick did with its n rows.

    sampled: the row has a new token, `drawn`. state: one of `GOES_ON` .. `FAILED`. depth:
    recursions of the token before it. useful: the row had work for the block. waits: it had, but
    its list is full. counts: entries of its lists afterwards.
    """

    sampled: Bool[Array, "n"]
    drawn: Sampled
    state: Int[Array, "n"]
    depth: Int[Array, "n"]
    useful: Bool[Array, "n"]
    waits: Bool[Array, "n"]
    counts: Int[Array, "n lists"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What became of a piece of a prompt; members as in `routed_prefill.Stored`.

    turn: the piece was the next one of its sequence; else an earlier one did not fit.
    """

    turn: Bool[Array, ""]
    fits: Bool[Array, ""]
    counts: Int[Array, "lists"]
    wanted: Int[Array, "lists"]
    depth: Int[Array, "n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Turned:
    """What leaving and entering gave n rows: samples, what now flies, entries of the end layers.

    goes: rows that have a new token on its way.
    """

    sampled: Sampled
    state: Int[Array, "n"]
    flight: TokenState
    goes: Bool[Array, "n"]
    last: KVEntry
    first: KVEntry


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """Compiled for a model; shapes of rows and pieces make variants of their own.

    eos: tokens that end a text. chunk: pages that attention visits at one time. group: tokens of a
    prompt that pass the layers at one time; fewer mean less work on those that are not there.
    """

    geometry: KVCacheSpec
    eos: tuple[int, ...]
    thresholds: tuple[float, ...]
    chunk: int
    group: int

    def compiled(self) -> "CompiledFunctions":
        """The jitted programs; slots and cache are given to them for good."""
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
        held: SequenceBlocks,
        step: "DecodeInput",
    ) -> tuple[BatchState, Cache, StepOutput]:
        """One tick of the rows of `step`."""
        rows = DecodeBatch(step.rows, slots.position[step.rows], step.valid)
        if slots.flight is None:
            return self._flat_tick(weights, slots, cache, held, (rows, step.want))
        return self._routed_tick(weights, slots, cache, held, (rows, step.want))

    def _flat_tick(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        held: SequenceBlocks,
        how: tuple[DecodeBatch, SamplingFeatures],
    ) -> tuple[BatchState, Cache, StepOutput]:
        rows, want = how
        at = rows.slot
        live = rows.valid & (slots.phase[at] == ENTERS)
        rows = dataclasses.replace(rows, valid=live)
        decoder = self._decoder(weights, held)
        hidden, cache = vanilla.decode(decoder, cache, rows, slots.token[at])
        sampled, state = self._sample(weights, slots, rows, hidden, want)
        counts = slots.counts[at] + live[:, None]
        nothing = jnp.zeros(at.shape, jnp.int32)
        ticked = StepOutput(
            sampled=live,
            drawn=sampled,
            state=state,
            depth=nothing,
            useful=live,
            waits=jnp.zeros(at.shape, bool),
            counts=counts,
        )
        return self._kept(slots, rows, ticked, None), cache, ticked

    def _routed_tick(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        held: SequenceBlocks,
        how: tuple[DecodeBatch, SamplingFeatures],
    ) -> tuple[BatchState, Cache, StepOutput]:
        rows, want = how
        at, cfg = rows.slot, self.geometry.cfg
        assert slots.flight is not None
        flight = jax.tree.map(lambda x: x[at], slots.flight)
        decoder = self._decoder(weights, held)
        flies = rows.valid & (slots.phase[at] == FLIES)
        which = self.geometry.list_of(flight.recursion)
        mine = jnp.take_along_axis(slots.counts[at], which[:, None], axis=1)[:, 0]
        room = jnp.take_along_axis(held.room[at], which[:, None], axis=1)[:, 0]
        runs = flies & routed_decode.needs_block(cfg, flight.taken, flight.recursion)
        adds = routed_decode.writes_list(cfg, runs, flight.recursion)
        waits = adds & (mine >= room)
        moves = flies & ~waits
        useful = moves & runs
        here = dataclasses.replace(rows, valid=moves)
        flight, leaves, cache = routed_decode.advance(decoder, cache, here, flight, mine)
        grown = (adds & moves)[:, None] & (jnp.arange(self.geometry.lists)[None] == which[:, None])
        counts = slots.counts[at] + grown
        enters = rows.valid & (slots.phase[at] == ENTERS)
        depth = flight.depth
        turned = self._turnover(decoder, slots, cache, rows, (leaves, enters, flight, want))
        left = dataclasses.replace(rows, valid=leaves)
        cache = routed_decode.store(decoder, cache, left, turned.last, 1)
        following = DecodeBatch(at, rows.position + leaves, turned.goes)
        cache = routed_decode.store(decoder, cache, following, turned.first, 0)
        ticked = StepOutput(
            sampled=leaves,
            drawn=turned.sampled,
            state=turned.state,
            depth=depth,
            useful=useful,
            waits=waits,
            counts=counts,
        )
        return self._kept(slots, rows, ticked, turned.flight), cache, ticked

    def _turnover(
        self,
        decoder: Decoder,
        slots: BatchState,
        cache: Cache,
        rows: DecodeBatch,
        what: tuple[Array, Array, TokenState, SamplingFeatures],
    ) -> _Turned:
        """Last layer, sampling and first layer for the rows that leave or enter.

        How many they are is known to the device alone: there is a branch for each of a few sizes.
        """
        leaves, enters, flight, want = what
        n = rows.slot.shape[0]
        turns = leaves | enters
        number = jnp.sum(turns, dtype=jnp.int32)
        order = jnp.argsort(~turns, stable=True).astype(jnp.int32)
        sizes = _sizes(n)
        none = KVEntry.empty(self.geometry.cfg, n)
        unsampled = (_unsampled(n), jnp.zeros(n, jnp.int32))
        nothing = _Turned(*unsampled, flight, jnp.zeros(n, bool), none, none)

        def branch(size: int) -> _Turned:
            if size == 0:
                return nothing
            index = order[:size]
            part = DecodeBatch(rows.slot[index], rows.position[index], leaves[index])
            hidden, last = routed_decode.leave(decoder, cache, part, flight.x[index])
            sampled, state = self._sample(decoder.weights, slots, part, hidden, want)
            token = jnp.where(part.valid, sampled.token, slots.token[part.slot])
            goes = enters[index] | (part.valid & (state == GOES_ON))
            following = DecodeBatch(part.slot, part.position + part.valid, goes)
            new, first = routed_decode.enter(decoder, cache, following, jnp.maximum(token, 0))
            old = jax.tree.map(lambda x: x[index], flight)
            new = jax.tree.map(lambda a, b: where_tokens(goes, a, b), new, old)
            made = _Turned(sampled, state, new, goes, last, first)
            return jax.tree.map(lambda whole, x: whole.at[index].set(x), nothing, made)

        which = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), number, side="left")
        return jax.lax.switch(which, [partial(branch, size) for size in sizes])

    def _sample(
        self,
        weights: Weights,
        slots: BatchState,
        rows: DecodeBatch,
        hidden: Float[Array, "n d"],
        want: SamplingFeatures,
    ) -> tuple[Sampled, Int[Array, "n"]]:
        """A token for each row, and what it means."""
        at = rows.slot
        settings = jax.tree.map(lambda x: x[at], slots.settings)
        before = PenaltyState(slots.output_counts[at], slots.in_prompt[at])
        scores = logits(weights, hidden)
        sampled = sample(scores, settings, rows.position + 1, want, before)
        over = jnp.any(sampled.token[:, None] == jnp.asarray(self.eos, jnp.int32)[None], axis=1)
        state = jnp.where(slots.left[at] <= 1, FULL, GOES_ON)
        state = jnp.where(over & slots.ends_text[at], ENDED, state)
        return sampled, jnp.where(sampled.token < 0, FAILED, state)

    def _kept(
        self, slots: BatchState, rows: DecodeBatch, ticked: StepOutput, flight: TokenState | None
    ) -> BatchState:
        """The slots after a tick."""
        at, sampled = rows.slot, ticked.sampled
        resting = FLIES if flight is not None else ENTERS
        entered = sampled | (slots.phase[at] == ENTERS)
        phase = jnp.where(rows.valid & entered, resting, slots.phase[at])
        phase = jnp.where(sampled & (ticked.state != GOES_ON), IDLE, phase)
        token = jnp.where(sampled, ticked.drawn.token, slots.token[at])
        # Rows that fill the shape all point to the last slot, whose contents mean nothing.
        said = slots.output_counts.at[at, jnp.maximum(token, 0)].add(sampled.astype(jnp.int16))
        new = dataclasses.replace(
            slots,
            phase=slots.phase.at[at].set(phase),
            token=slots.token.at[at].set(token),
            position=slots.position.at[at].add(sampled.astype(jnp.int32)),
            left=slots.left.at[at].add(-sampled.astype(jnp.int32)),
            counts=slots.counts.at[at].set(ticked.counts),
            output_counts=said,
        )
        if flight is None or slots.flight is None:
            return new
        moved = jax.tree.map(lambda whole, x: whole.at[at].set(x), slots.flight, flight)
        return dataclasses.replace(new, flight=moved)

    def _decoder(self, weights: Weights, held: SequenceBlocks) -> Decoder:
        thresholds = jnp.asarray(self.thresholds, jnp.float32)
        return Decoder(self.geometry, weights, held.tables, thresholds, self.chunk)

    def prefill(
        self,
        weights: Weights,
        slots: BatchState,
        cache: Cache,
        held: SequenceBlocks,
        piece: "PrefillInput",
    ) -> tuple[BatchState, Cache, Prefilled]:
        """Stores a piece of a prompt; with `start` 0 it is the first one of its sequence."""
        at, n = piece.slot, piece.tokens.shape[0]
        first = piece.start == 0
        turn = first | (slots.filled[at] == piece.start)
        counts = jnp.where(first, 0, slots.counts[at])
        place = jnp.arange(n, dtype=jnp.int32)
        live = turn & (place < piece.number)
        rows = PrefillChunk(at, piece.start + place, live)
        decoder = self._decoder(weights, held)
        if slots.flight is None:
            cache = self._flat_prefill(decoder, cache, rows, piece)
            after = counts + jnp.where(turn, piece.number, 0)
            nothing = jnp.zeros(n, jnp.int32)
            done = Prefilled(turn, jnp.array(True), after, after, nothing)
        else:
            group = max(min(8, n), min(self.group, n // 4))
            lists = (counts, held.room[at])
            stored, cache = routed_prefill.prefill(decoder, cache, rows, piece.tokens, lists, group)
            done = Prefilled(turn, stored.fits, stored.counts, stored.wanted, stored.depth)
        before = jnp.where(first, 0, slots.filled[at])
        filled = before + jnp.where(turn & done.fits, piece.number, 0)
        slots = dataclasses.replace(
            slots,
            filled=slots.filled.at[at].set(filled),
            counts=slots.counts.at[at].set(done.counts),
        )
        return slots, cache, done

    def _flat_prefill(
        self, decoder: Decoder, cache: Cache, rows: PrefillChunk, piece: "PrefillInput"
    ) -> Cache:
        """All layers on groups of the piece's tokens: no more groups than there are tokens for."""
        n = piece.tokens.shape[0]
        group = min(self.group, n)
        if group == n:
            return vanilla.prefill(decoder, cache, rows, piece.tokens)
        rounds = jnp.where(rows.valid[0], (piece.number + group - 1) // group, 0)

        def cut(x: Array, i: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(jnp.pad(x, (0, -n % group)), i * group, group)

        def store(i: Array, cache: Cache) -> Cache:
            part = PrefillChunk(rows.slot, cut(rows.position, i), cut(rows.valid, i))
            return vanilla.prefill(decoder, cache, part, cut(piece.tokens, i))

        return jax.lax.fori_loop(0, rounds, store, cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeInput:
    """The rows of a tick. rows: their slots, distinct but for fillers. want: what any asks for."""

    rows: Int[Array, "n"] | np.ndarray
    valid: Bool[Array, "n"] | np.ndarray
    want: SamplingFeatures


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillInput:
    """A piece of a prompt: its slot, its first position, and its `number` first `tokens`."""

    slot: Int[Array, ""] | np.int32
    start: Int[Array, ""] | np.int32
    number: Int[Array, ""] | np.int32
    tokens: Int[Array, "n"] | np.ndarray


@dataclasses.dataclass(frozen=True)
class CompiledFunctions:
    """`Programs.tick`, `Programs.prefill` and `slots.admit`, jitted."""

    decode_step: "jax.stages.Wrapped"
    prefill: "jax.stages.Wrapped"
    admit: "jax.stages.Wrapped"


def _sizes(n: int) -> list[int]:
    """Numbers of rows, of n, for which there is a program. Below 8 rows time hardly falls."""
    parts = (-(-n * eighths // 8) for eighths in (2, 3, 4, 6))
    return [0, *sorted({part for part in parts if part >= 8} | {n})]


def _unsampled(n: int) -> Sampled:
    return Sampled(
        token=jnp.zeros(n, jnp.int32),
        logprob=jnp.zeros(n),
        top_ids=jnp.full((n, MAX_LOGPROBS), -1, jnp.int32),
        top_logprobs=jnp.full((n, MAX_LOGPROBS), -jnp.inf),
    )
