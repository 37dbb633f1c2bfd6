"""Schedules, launches and reads decode steps and prefill chunks, all on the engine's thread.

The device is one step ahead of what the host has read, so scheduling, detokenisation and events
cost no device time. The host therefore schedules with results that are one step old; the compiled
functions check what may have changed since.
"""

import dataclasses
import time

import jax
import numpy as np

from mor_jax.inference.config import CachePlan
from mor_jax.inference.engine import step_functions
from mor_jax.inference.engine.batch_state import (
    Admission,
    BatchState,
    DecodeInput,
    PrefillInput,
    SequenceBlocks,
)
from mor_jax.inference.engine.request import Reason, Request
from mor_jax.inference.engine.sampling import SamplingFeatures
from mor_jax.inference.engine.scheduler import Scheduler
from mor_jax.inference.engine.sequence import Sequence
from mor_jax.inference.engine.statistics import Counters, Statistics
from mor_jax.inference.engine.step_functions import StepFunctions, StepOutput
from mor_jax.inference.load_model import LoadedModel
from mor_jax.models.decode.layer import Weights
from mor_jax.models.decode.paged_cache import BlockTables

CHUNK_TOKENS = {"cpu": 1024}
"""Cached tokens that attention reads at a time, by backend: what fits a CPU core's cache."""

GROUP_TOKENS = {"cpu": 64}
"""Prompt tokens that go through the layers at a time, by backend; elsewhere the whole chunk."""


@dataclasses.dataclass(frozen=True)
class _PendingStep:
    """A launched function: its future output, its sequences with their epochs, first position."""

    output: object
    sequences: list[tuple[Sequence, int]]
    start: int | None = None


class ModelRunner:
    """Model, KV cache and compiled functions on the device, and the scheduler on the host."""

    def __init__(self, model: LoadedModel, plan: CachePlan, chunk_size: int):
        self.plan, self.counters = plan, Counters()
        self.scheduler = Scheduler(plan, self.counters)
        self.depth_counts = np.zeros(plan.spec.cfg.num_recursions + 1, np.int64)
        self._routed = plan.spec.cfg.router.kind != "none"
        self._vocab_size = plan.spec.cfg.vocab_size
        cfg = plan.spec.cfg
        # Committed to one device: uncommitted arrays would compile every function a second time.
        self._device = jax.local_devices()[0]
        weights = jax.jit(lambda params: Weights.of(cfg, params))(model.params)
        slots = BatchState.empty(plan.spec, plan.slots)
        cache = plan.spec.cache(plan.end_pages, plan.block_pages)
        self._weights, self._slots, self._cache = jax.device_put(
            (weights, slots, cache), self._device
        )
        tokens = CHUNK_TOKENS.get(jax.default_backend(), 16384)
        thresholds = model.thresholds or (0.0,) * cfg.num_recursions
        eos = tuple(sorted(model.eos_ids)) or (-2,)
        pages_per_read = max(1, tokens // plan.spec.size)
        self._device_blocks: SequenceBlocks | None = None
        self._chunk_size = min(chunk_size, plan.max_length)
        group_tokens = GROUP_TOKENS.get(jax.default_backend(), self._chunk_size)
        self._functions = StepFunctions(
            plan.spec, eos, thresholds, pages_per_read, group_tokens
        ).compiled()
        self._pending: list[_PendingStep] = []
        self._last_busy = 0.0
        self._batch_sizes = _batch_sizes(plan.slots)
        self._features: tuple[list[Sequence], SamplingFeatures] = ([], SamplingFeatures.of([]))

    def warmup(self) -> None:
        """Compiles every function by running it on padding."""
        empty_slot = self.plan.slots
        for rows in self._batch_sizes:
            slots = np.full(rows, empty_slot, np.int32)
            self._decode(DecodeInput(slots, np.zeros(rows, bool), SamplingFeatures.of([])))
        tokens = np.zeros(self._chunk_size, np.int32)
        self._prefill(PrefillInput(np.int32(empty_slot), np.int32(0), np.int32(0), tokens))
        admission = Admission.of(Request(prompt=(0,)), empty_slot, [], 0, self._vocab_size)
        self._slots = self._functions.admit(self._slots, admission)

    def step(self) -> bool:
        """Launches the next prefill chunk and decode step, then reads the previous ones.

        Returns False if there was nothing to do.
        """
        start_time = time.perf_counter()
        scheduler, sent = self.scheduler, []
        scheduler.admit()
        scheduler.grow()
        if scheduler.running:
            self._track_idle(sending=True)
        sequence = scheduler.next_prefill()
        if sequence is not None:
            sent += self._send_prefill(sequence)
        decoding = scheduler.decoding()
        if decoding:
            sent.append(self._send_decode(decoding))
        previous, self._pending = self._pending, sent
        waited = sum(self._process(step) for step in previous)
        if previous or sent:
            self._track_idle(sending=False)
            spent = time.perf_counter() - start_time
            self.counters.busy_seconds += spent
            self.counters.host_seconds += spent - waited
        return bool(previous or sent)

    def _send_prefill(self, sequence: Sequence) -> list[_PendingStep]:
        """Launches the next prefill chunk; after the last one, the admission to decoding."""
        tokens, start = sequence.tokens, sequence.prefilled
        sent = []
        count = min(self._chunk_size, len(tokens) - 1 - start)
        if count > 0:
            chunk = np.zeros(self._chunk_size, np.int32)
            chunk[:count] = tokens[start : start + count]
            slot = np.int32(sequence.slot)
            output = self._prefill(PrefillInput(slot, np.int32(start), np.int32(count), chunk))
            sent.append(_PendingStep(output, [(sequence, sequence.epoch)], start))
            sequence.prefilled += count
            self.counters.prompt_tokens += count
        if sequence.prefilled == len(tokens) - 1:
            admission = Admission.of(
                sequence.request,
                sequence.slot,
                sequence.output_tokens,
                sequence.seed,
                self._vocab_size,
            )
            self._slots = self._functions.admit(self._slots, admission)
            sequence.decoding = True
        return sent

    def _send_decode(self, sequences: list[Sequence]) -> _PendingStep:
        batch_size = next(size for size in self._batch_sizes if size >= len(sequences))
        slots = np.full(batch_size, self.plan.slots, np.int32)
        slots[: len(sequences)] = [sequence.slot for sequence in sequences]
        valid = np.arange(batch_size) < len(sequences)
        if self._features[0] != sequences:
            self._features = (
                sequences,
                SamplingFeatures.of([sequence.request for sequence in sequences]),
            )
        output = self._decode(DecodeInput(slots, valid, self._features[1]))
        self.counters.decode_steps += 1
        self.counters.rows += batch_size
        return _PendingStep(output, [(sequence, sequence.epoch) for sequence in sequences])

    def _track_idle(self, *, sending: bool) -> None:
        """Adds the time since the device was last seen busy to its idle time, an upper bound."""
        now = time.perf_counter()
        if any(not jax.tree.leaves(step.output)[0].is_ready() for step in self._pending):
            self._last_busy = now
        elif sending and self._pending:
            self.counters.idle_seconds += now - self._last_busy
        if sending:
            self._last_busy = now

    def _decode(self, inputs: DecodeInput) -> StepOutput:
        run, blocks = self._functions.decode_step, self._block_tables()
        self._slots, self._cache, output = run(
            self._weights, self._slots, self._cache, blocks, inputs
        )
        return output

    def _prefill(self, inputs: PrefillInput) -> step_functions.PrefillOutput:
        run, blocks = self._functions.prefill, self._block_tables()
        self._slots, self._cache, output = run(
            self._weights, self._slots, self._cache, blocks, inputs
        )
        return output

    def _block_tables(self) -> SequenceBlocks:
        """The block tables on the device, copied because the host keeps changing its own."""
        pages = self.scheduler.pages
        if self._device_blocks is None or pages.changed:
            tables = BlockTables(pages.end_table.copy(), pages.block_table.copy())
            self._device_blocks = jax.device_put(
                SequenceBlocks(tables, pages.capacity_tokens.copy()), self._device
            )
            pages.changed = False
        return self._device_blocks

    def _process(self, step: _PendingStep) -> float:
        """Waits for a launched function and reads its output; returns the seconds waited."""
        start_time = time.perf_counter()
        jax.block_until_ready(step.output)
        # What was launched after it runs from now on at the latest.
        self._last_busy = time.perf_counter()
        waited = self._last_busy - start_time
        if isinstance(step.output, StepOutput):
            self._process_decode(step)
        else:
            self._process_prefill(step)
        return waited

    def _process_decode(self, step: _PendingStep) -> None:
        needs_logprobs = any(one.request.logprobs is not None for one, _ in step.sequences)
        output = step.output
        names = ["sampled", "state", "depth", "useful", "stalled", "counts"]
        outputs = {name: np.asarray(getattr(output, name)) for name in names}
        names = ["token", "logprob", "top_ids", "top_logprobs"] if needs_logprobs else ["token"]
        outputs |= {name: np.asarray(getattr(output.samples, name)) for name in names}
        self.counters.useful_rows += int(outputs["useful"].sum())
        self.counters.stalls += int(outputs["stalled"].sum())
        if self._routed:
            depths = outputs["depth"][outputs["sampled"]]
            self.depth_counts += np.bincount(depths, minlength=len(self.depth_counts))
        for row, (sequence, epoch) in enumerate(step.sequences):
            if sequence.finished or sequence.epoch != epoch:
                continue
            sequence.counts = outputs["counts"][row]
            if outputs["sampled"][row]:
                self._process_token(sequence, row, outputs)

    def _process_token(self, sequence: Sequence, row: int, outputs: dict[str, np.ndarray]) -> None:
        state = outputs["state"][row]
        if state == step_functions.FAILED:
            self.end(sequence, "error", "the model's logits are not finite")
        elif state == step_functions.EOS:
            self.end(sequence, "stop")
        else:
            details = {"depth": int(outputs["depth"][row]), **_logprobs(sequence, row, outputs)}
            reason = sequence.append_token(int(outputs["token"][row]), details)
            self.counters.tokens += 1
            if reason is not None:
                self.end(sequence, reason)

    def _process_prefill(self, step: _PendingStep) -> None:
        (sequence, epoch) = step.sequences[0]
        output = step.output
        if sequence.finished or sequence.epoch != epoch:
            return
        sequence.counts = np.asarray(output.counts)
        if bool(output.in_order) and bool(output.fits):
            if self._routed:
                count = min(self._chunk_size, len(sequence.tokens) - 1 - step.start)
                depths = np.asarray(output.depth)[:count]
                self.depth_counts += np.bincount(depths, minlength=len(self.depth_counts))
            return
        # The KV lists were too short for this chunk: it is discarded and sent again.
        sequence.rewind(step.start)
        for index, required in enumerate(np.asarray(output.required)):
            if sequence.slot is None:
                return
            self.scheduler.ensure_capacity(sequence, index, int(required))

    def end(self, sequence: Sequence, reason: Reason, message: str = "") -> None:
        """Ends a running or waiting sequence and emits its `Finished` event."""
        self.scheduler.remove(sequence)
        if reason in ("stop", "length"):
            self.counters.finished += 1
        elif reason == "error":
            self.counters.failed += 1
        else:
            self.counters.cancelled += 1
        sequence.finish(reason, message)

    def statistics(self) -> Statistics:
        """Current counters and gauges. Read-only; other threads may call it."""
        spec, pages = self.plan.spec, self.scheduler.pages
        ends, block = pages.used
        used = ends * spec.end_page_bytes + block * spec.block_page_bytes
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
            depth_counts=tuple(self.depth_counts.tolist()) if self._routed else (),
            **dataclasses.asdict(self.counters),
        )

    def _stored_bytes(self, sequence: Sequence) -> int:
        spec, counts = self.plan.spec, sequence.counts
        if counts is None:
            return 0
        # The end layers store every token, the block as many as its KV lists count.
        stored = len(sequence.tokens) - 1 if sequence.decoding else sequence.prefilled
        ends = spec.end_layers * stored
        return spec.token_bytes * int(ends + spec.block_layers * int(counts.sum()))


def _batch_sizes(slots: int) -> list[int]:
    """Batch sizes for which a decode step is compiled, ascending."""
    sizes = [slots]
    while sizes[-1] > 4:
        sizes.append(sizes[-1] // 4)
    return sizes[::-1]


def _logprobs(sequence: Sequence, row: int, outputs: dict[str, np.ndarray]) -> dict[str, object]:
    count = sequence.request.logprobs
    if count is None:
        return {}
    ids, values = (
        outputs["top_ids"][row, :count].tolist(),
        outputs["top_logprobs"][row, :count].tolist(),
    )
    top = tuple((i, value) for i, value in zip(ids, values, strict=True) if i >= 0)
    return {"logprob": float(outputs["logprob"][row]), "top": top}
