"""The scheduler: the waiting queue, the slots and the KV cache pages. Runs on the host alone."""

import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from mor_jax.inference.config import CachePlan
from mor_jax.inference.engine.block_pool import BlockAllocator
from mor_jax.inference.engine.sequence import Sequence
from mor_jax.inference.engine.statistics import Counters

LOOKAHEAD_TOKENS = 2
"""Entries that a KV list may get before the host reads its length: the step that runs, the next."""


class Scheduler:
    """First come, first served; the newest sequence is preempted when pages run out.

    A sequence reserves its pages when it gets its slot. It needs more only if its tokens go deeper
    than expected (counted as an overflow). If no page is free then, the newest sequence is
    preempted: it frees its pages and is recomputed later.
    """

    def __init__(self, plan: CachePlan, counters: Counters):
        self.plan = plan
        self.pages = BlockAllocator(plan)
        self.counters = counters
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._free_slots = list(range(plan.slots - 1, -1, -1))
        self._admissions = 0

    def admit(self) -> None:
        """Gives slots and pages to waiting sequences, in order."""
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            slot = self._free_slots[-1]
            blocks = self.pages.reserve(slot, *self._blocks_needed(sequence))
            if blocks is None:
                # Alone, every accepted sequence fits the cache, however deep its tokens go.
                assert self.running
                return
            self._free_slots.pop()
            self.waiting.popleft()
            self._admissions += 1
            sequence.slot, sequence.blocks, sequence.admission_order = (
                slot,
                blocks,
                self._admissions,
            )
            sequence.counts = np.zeros(self.plan.spec.lists, np.int64)
            if sequence.first_scheduled_time is None:
                sequence.first_scheduled_time = time.monotonic()
            self.running[slot] = sequence

    def _blocks_needed(self, sequence: Sequence) -> tuple[int, tuple[int, ...]]:
        size = self.plan.spec.size
        ends, lists = self.plan.pages(sequence.max_length)
        observed = (
            -(-sequence.min_capacity_tokens.get(index, 0) // size) for index in range(len(lists))
        )
        return ends, tuple(max(pair) for pair in zip(lists, observed, strict=True))

    def next_prefill(self) -> Sequence | None:
        """The oldest running sequence that does not decode yet; None if all of them do."""
        prefilling = [sequence for sequence in self.running.values() if not sequence.decoding]
        return min(prefilling, key=lambda sequence: sequence.admission_order, default=None)

    def decoding(self) -> list[Sequence]:
        """The sequences of the next decode step."""
        return [sequence for sequence in self.running.values() if sequence.decoding]

    def grow(self) -> None:
        """Adds pages to every KV list that may be full soon."""
        for sequence in self.decoding():
            for index in self._nearly_full(sequence):
                self.ensure_capacity(
                    sequence, index, int(sequence.counts[index]) + LOOKAHEAD_TOKENS
                )

    def _nearly_full(self, sequence: Sequence) -> Iterator[int]:
        for index in range(self.plan.spec.lists):
            # It may have been preempted meanwhile.
            if sequence.slot is None or sequence.counts is None:
                return
            capacity_tokens = self.pages.capacity_tokens[sequence.slot, index]
            if (
                sequence.counts[index] + LOOKAHEAD_TOKENS > capacity_tokens
                and capacity_tokens < sequence.max_length
            ):
                yield index

    def ensure_capacity(self, sequence: Sequence, index: int, required: int) -> None:
        """Grows a KV list to hold `required` entries; preempts newer sequences if it has to.

        If no newer sequence is left, the sequence itself is preempted.
        """
        required = min(required, sequence.max_length)
        sequence.min_capacity_tokens[index] = max(
            required, sequence.min_capacity_tokens.get(index, 0)
        )
        while (
            sequence.slot is not None
            and self.pages.capacity_tokens[sequence.slot, index] < required
        ):
            if self.pages.extend(sequence.slot, sequence.blocks, index):
                self.counters.overflows += 1
                continue
            newest = max(self.running.values(), key=lambda other: other.admission_order)
            # Alone it may use all pages, which are enough for its length at any depth.
            assert newest is not sequence or len(self.running) > 1
            self.preempt(newest)

    def preempt(self, sequence: Sequence) -> None:
        """Frees a sequence's slot and pages, and puts it at the front of the waiting queue."""
        self.counters.preemptions += 1
        self._release(sequence)
        sequence.restart()
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a finished sequence from its slot or from the queue."""
        if sequence.slot is not None:
            self._release(sequence)
            sequence.restart()
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.blocks)
        del self.running[sequence.slot]
        self._free_slots.append(sequence.slot)

    def unfinished(self) -> list[Sequence]:
        """All running and waiting sequences."""
        return [*self.running.values(), *self.waiting]
