"""The engine's work on one thread: plan a tick, send it, read what the one before did.

The device is always one tick ahead of what the host has read, so planning, text and events cost it
nothing. What the host plans with is therefore one tick old; the device's programs check what may
have changed since.
"""

import dataclasses
import time

import jax
import numpy as np

from mor_jax.inference.config import CachePlan
from mor_jax.inference.engine import step_functions
from mor_jax.inference.engine.batch_state import Admission, BatchState, SequenceBlocks
from mor_jax.inference.engine.request import Reason, Request
from mor_jax.inference.engine.sampling import SamplingFeatures
from mor_jax.inference.engine.scheduler import Scheduler
from mor_jax.inference.engine.sequence import Sequence
from mor_jax.inference.engine.statistics import Counters, Statistics
from mor_jax.inference.engine.step_functions import (
    DecodeInput,
    PrefillInput,
    StepFunctions,
    StepOutput,
)
from mor_jax.inference.load_model import LoadedModel
from mor_jax.models.decode.layer import Weights
from mor_jax.models.decode.paged_cache import BlockTables

CHUNK_TOKENS = {"cpu": 1024}
"""Cached tokens that attention visits at one time: what fits a core's cache; elsewhere more."""

GROUP_TOKENS = {"cpu": 64}
"""Tokens of a prompt that pass the layers at one time; elsewhere the whole piece."""


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A program on its way: what it will answer, who took part, in which of their epochs."""

    answer: object
    who: list[tuple[Sequence, int]]
    start: int | None = None


class ModelRunner:
    """Model, cache and programs on the device, and the host's plan for them."""

    def __init__(self, served: LoadedModel, plan: CachePlan, piece: int):
        self.plan, self.counters = plan, Counters()
        self.scheduler = Scheduler(plan, self.counters)
        self.depths = np.zeros(plan.geometry.cfg.num_recursions + 1, np.int64)
        self._routed = plan.geometry.cfg.router.kind != "none"
        self._vocabulary = plan.geometry.cfg.vocab_size
        cfg = plan.geometry.cfg
        # Bound to one device: arrays that are not would have every program compiled once more.
        self._device = jax.local_devices()[0]
        weights = jax.jit(lambda params: Weights.of(cfg, params))(served.params)
        slots = BatchState.empty(plan.geometry, plan.slots)
        cache = plan.geometry.cache(plan.end_pages, plan.block_pages)
        self._weights, self._slots, self._cache = jax.device_put(
            (weights, slots, cache), self._device
        )
        tokens = CHUNK_TOKENS.get(jax.default_backend(), 16384)
        thresholds = served.thresholds or (0.0,) * cfg.num_recursions
        ends = tuple(sorted(served.eos_ids)) or (-2,)
        chunk = max(1, tokens // plan.geometry.size)
        self._held: SequenceBlocks | None = None
        self._piece = min(piece, plan.max_length)
        group = GROUP_TOKENS.get(jax.default_backend(), self._piece)
        self._run = StepFunctions(plan.geometry, ends, thresholds, chunk, group).compiled()
        self._flying: list[_Sent] = []
        self._seen_busy = 0.0
        self._row_counts = _row_counts(plan.slots)
        self._wants: tuple[list[Sequence], SamplingFeatures] = ([], SamplingFeatures.of([]))

    def warm(self) -> None:
        """Compiles every program by running it on nobody."""
        nobody = self.plan.slots
        for rows in self._row_counts:
            slots = np.full(rows, nobody, np.int32)
            self._tick(DecodeInput(slots, np.zeros(rows, bool), SamplingFeatures.of([])))
        tokens = np.zeros(self._piece, np.int32)
        self._store(PrefillInput(np.int32(nobody), np.int32(0), np.int32(0), tokens))
        new = Admission.of(Request(prompt=(0,)), nobody, [], 0, self._vocabulary)
        self._slots = self._run.admit(self._slots, new)

    def step(self) -> bool:
        """Sends the next piece of a prompt and the next tick, and reads the ones before.

        False if there was nothing to do.
        """
        begun = time.perf_counter()
        scheduler, sent = self.scheduler, []
        scheduler.admit()
        scheduler.grow()
        if scheduler.running:
            self._watch(sends=True)
        sequence = scheduler.next_prompt()
        if sequence is not None:
            sent += self._send_prompt(sequence)
        rows = scheduler.decoding()
        if rows:
            sent.append(self._send_tick(rows))
        before, self._flying = self._flying, sent
        waited = sum(self._read(one) for one in before)
        if before or sent:
            self._watch(sends=False)
            spent = time.perf_counter() - begun
            self.counters.busy_seconds += spent
            self.counters.host_seconds += spent - waited
        return bool(before or sent)

    def _send_prompt(self, sequence: Sequence) -> list[_Sent]:
        """A piece of the sequence's tokens; after the last one, its start."""
        tokens, start = sequence.tokens, sequence.stored
        sent = []
        number = min(self._piece, len(tokens) - 1 - start)
        if number > 0:
            piece = np.zeros(self._piece, np.int32)
            piece[:number] = tokens[start : start + number]
            slot = np.int32(sequence.slot)
            answer = self._store(PrefillInput(slot, np.int32(start), np.int32(number), piece))
            sent.append(_Sent(answer, [(sequence, sequence.epoch)], start))
            sequence.stored += number
            self.counters.prompt_tokens += number
        if sequence.stored == len(tokens) - 1:
            new = Admission.of(
                sequence.request, sequence.slot, sequence.answer, sequence.seed, self._vocabulary
            )
            self._slots = self._run.admit(self._slots, new)
            sequence.decodes = True
        return sent

    def _send_tick(self, sequences: list[Sequence]) -> _Sent:
        rows = next(size for size in self._row_counts if size >= len(sequences))
        slots = np.full(rows, self.plan.slots, np.int32)
        slots[: len(sequences)] = [sequence.slot for sequence in sequences]
        live = np.arange(rows) < len(sequences)
        if self._wants[0] != sequences:
            self._wants = (
                sequences,
                SamplingFeatures.of([sequence.request for sequence in sequences]),
            )
        answer = self._tick(DecodeInput(slots, live, self._wants[1]))
        self.counters.ticks += 1
        self.counters.rows += rows
        return _Sent(answer, [(sequence, sequence.epoch) for sequence in sequences])

    def _watch(self, *, sends: bool) -> None:
        """Adds to the device's idle time, an upper bound: since it was last seen to have work."""
        now = time.perf_counter()
        if any(not jax.tree.leaves(one.answer)[0].is_ready() for one in self._flying):
            self._seen_busy = now
        elif sends and self._flying:
            self.counters.idle_seconds += now - self._seen_busy
        if sends:
            self._seen_busy = now

    def _tick(self, step: DecodeInput) -> StepOutput:
        run, held = self._run.decode_step, self._pages()
        self._slots, self._cache, done = run(self._weights, self._slots, self._cache, held, step)
        return done

    def _store(self, piece: PrefillInput) -> step_functions.Prefilled:
        run, held = self._run.prefill, self._pages()
        self._slots, self._cache, done = run(self._weights, self._slots, self._cache, held, piece)
        return done

    def _pages(self) -> SequenceBlocks:
        """The tables on the device. Copies: the host goes on to change its own."""
        pages = self.scheduler.pages
        if self._held is None or pages.changed:
            tables = BlockTables(pages.end_table.copy(), pages.block_table.copy())
            self._held = jax.device_put(SequenceBlocks(tables, pages.room.copy()), self._device)
            pages.changed = False
        return self._held

    def _read(self, sent: _Sent) -> float:
        """Takes in what a program did; returns the seconds that it was waited for."""
        begun = time.perf_counter()
        jax.block_until_ready(sent.answer)
        # What was sent after it runs from now on at the latest.
        self._seen_busy = time.perf_counter()
        waited = self._seen_busy - begun
        if isinstance(sent.answer, StepOutput):
            self._read_tick(sent)
        else:
            self._read_prompt(sent)
        return waited

    def _read_tick(self, sent: _Sent) -> None:
        wanted = any(one.request.logprobs is not None for one, _ in sent.who)
        ticked = sent.answer
        names = ["sampled", "state", "depth", "useful", "waits", "counts"]
        told = {name: np.asarray(getattr(ticked, name)) for name in names}
        names = ["token", "logprob", "top_ids", "top_logprobs"] if wanted else ["token"]
        told |= {name: np.asarray(getattr(ticked.drawn, name)) for name in names}
        self.counters.useful_rows += int(told["useful"].sum())
        self.counters.waits += int(told["waits"].sum())
        if self._routed:
            depths = told["depth"][told["sampled"]]
            self.depths += np.bincount(depths, minlength=len(self.depths))
        for row, (sequence, epoch) in enumerate(sent.who):
            if sequence.done or sequence.epoch != epoch:
                continue
            sequence.counts = told["counts"][row]
            if told["sampled"][row]:
                self._sampled(sequence, row, told)

    def _sampled(self, sequence: Sequence, row: int, told: dict[str, np.ndarray]) -> None:
        state = told["state"][row]
        if state == step_functions.FAILED:
            self.end(sequence, "error", "the model's output was not a number")
        elif state == step_functions.ENDED:
            self.end(sequence, "stop")
        else:
            about = {"depth": int(told["depth"][row]), **_logprobs(sequence, row, told)}
            reason = sequence.says(int(told["token"][row]), about)
            self.counters.tokens += 1
            if reason is not None:
                self.end(sequence, reason)

    def _read_prompt(self, sent: _Sent) -> None:
        (sequence, epoch) = sent.who[0]
        done = sent.answer
        if sequence.done or sequence.epoch != epoch:
            return
        sequence.counts = np.asarray(done.counts)
        if bool(done.turn) and bool(done.fits):
            if self._routed:
                number = min(self._piece, len(sequence.tokens) - 1 - sent.start)
                depths = np.asarray(done.depth)[:number]
                self.depths += np.bincount(depths, minlength=len(self.depths))
            return
        # The lists were too short for this piece: nothing of it counts, it is sent again.
        sequence.rewind(sent.start)
        for number, need in enumerate(np.asarray(done.wanted)):
            if sequence.slot is None:
                return
            self.scheduler.make_room(sequence, number, int(need))

    def end(self, sequence: Sequence, reason: Reason, message: str = "") -> None:
        """Ends a sequence wherever it is, and tells it."""
        self.scheduler.remove(sequence)
        if reason in ("stop", "length"):
            self.counters.finished += 1
        elif reason == "error":
            self.counters.failed += 1
        else:
            self.counters.cancelled += 1
        sequence.ends(reason, message)

    def statistics(self) -> Statistics:
        """Where it stands. Reads only; other threads may call it."""
        geometry, pages = self.plan.geometry, self.scheduler.pages
        ends, block = pages.used
        used = ends * geometry.end_page_bytes + block * geometry.block_page_bytes
        running = list(self.scheduler.running.values())
        return Statistics(
            running=len(running),
            waiting=len(self.scheduler.waiting),
            slots=self.plan.slots,
            pages=self.plan.end_pages + self.plan.block_pages,
            pages_used=ends + block,
            cache_bytes=self.plan.cache_bytes,
            used_bytes=used,
            stored_bytes=sum(self._stored_bytes(sequence) for sequence in running),
            depth_counts=tuple(self.depths.tolist()) if self._routed else (),
            **dataclasses.asdict(self.counters),
        )

    def _stored_bytes(self, sequence: Sequence) -> int:
        geometry, counts = self.plan.geometry, sequence.counts
        if counts is None:
            return 0
        # At the ends every token is stored, in the block as many as its lists count.
        known = len(sequence.tokens) - 1 if sequence.decodes else sequence.stored
        ends = geometry.end_layers * known
        return geometry.token_bytes * int(ends + geometry.block_layers * int(counts.sum()))


def _row_counts(slots: int) -> list[int]:
    """Numbers of rows for which there is a program of a tick, ascending."""
    sizes = [slots]
    while sizes[-1] > 4:
        sizes.append(sizes[-1] // 4)
    return sizes[::-1]


def _logprobs(sequence: Sequence, row: int, told: dict[str, np.ndarray]) -> dict[str, object]:
    asked = sequence.request.logprobs
    if asked is None:
        return {}
    ids, values = told["top_ids"][row, :asked].tolist(), told["top_logprobs"][row, :asked].tolist()
    top = tuple((i, value) for i, value in zip(ids, values, strict=True) if i >= 0)
    return {"logprob": float(told["logprob"][row]), "top": top}
