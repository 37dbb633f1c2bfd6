"""Who runs: the queue, the slots and the pages. Knows nothing of the device."""

import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from mor_jax.inference.config import CachePlan
from mor_jax.inference.engine.block_pool import BlockAllocator
from mor_jax.inference.engine.sequence import Sequence
from mor_jax.inference.engine.statistics import Counters

AHEAD = 2
"""Entries that a list may get before the host next hears of it: a tick in flight, and the next."""


class Scheduler:
    """First come, first served; whoever came last gives way when pages run out.

    A sequence reserves its pages when it gets its slot, so it can run to its end. Only where its
    tokens go deeper than expected does it need more; that is counted, and if no page is free the
    youngest sequence gives up its own and is computed again later.
    """

    def __init__(self, plan: CachePlan, counters: Counters):
        self.plan = plan
        self.pages = BlockAllocator(plan)
        self.counters = counters
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._free = list(range(plan.slots - 1, -1, -1))
        self._admissions = 0

    def admit(self) -> None:
        """Gives slots and pages to those who wait, in order."""
        while self.waiting and self._free:
            sequence = self.waiting[0]
            slot = self._free[-1]
            held = self.pages.reserve(slot, *self._wanted(sequence))
            if held is None:
                # The cache holds any one that was taken, however deep its tokens go.
                assert self.running
                return
            self._free.pop()
            self.waiting.popleft()
            self._admissions += 1
            sequence.slot, sequence.held, sequence.order = slot, held, self._admissions
            sequence.counts = np.zeros(self.plan.geometry.lists, np.int64)
            if sequence.placed is None:
                sequence.placed = time.monotonic()
            self.running[slot] = sequence

    def _wanted(self, sequence: Sequence) -> tuple[int, tuple[int, ...]]:
        size = self.plan.geometry.size
        ends, lists = self.plan.pages(sequence.length)
        known = (-(-sequence.needs.get(number, 0) // size) for number in range(len(lists)))
        return ends, tuple(max(pair) for pair in zip(lists, known, strict=True))

    def next_prompt(self) -> Sequence | None:
        """Who has tokens to be stored, or waits for nothing but its start; the oldest first."""
        ready = [sequence for sequence in self.running.values() if not sequence.decodes]
        return min(ready, key=lambda sequence: sequence.order, default=None)

    def decoding(self) -> list[Sequence]:
        """Who takes part in the next tick."""
        return [sequence for sequence in self.running.values() if sequence.decodes]

    def grow(self) -> None:
        """Makes room in every list that might be full soon."""
        for sequence in self.decoding():
            for number in self._nearly_full(sequence):
                self.make_room(sequence, number, int(sequence.counts[number]) + AHEAD)

    def _nearly_full(self, sequence: Sequence) -> Iterator[int]:
        for number in range(self.plan.geometry.lists):
            # It may have been made to wait meanwhile.
            if sequence.slot is None or sequence.counts is None:
                return
            room = self.pages.room[sequence.slot, number]
            if sequence.counts[number] + AHEAD > room and room < sequence.length:
                yield number

    def make_room(self, sequence: Sequence, number: int, need: int) -> None:
        """Room for `need` entries in a list, at others' expense if it must be.

        Where no younger sequence is left that could give way, the sequence itself goes back to the
        queue.
        """
        need = min(need, sequence.length)
        sequence.needs[number] = max(need, sequence.needs.get(number, 0))
        while sequence.slot is not None and self.pages.room[sequence.slot, number] < need:
            if self.pages.extend(sequence.slot, sequence.held, number):
                self.counters.overflows += 1
                continue
            youngest = max(self.running.values(), key=lambda other: other.order)
            # Alone it has all pages, which are enough for its length at any depth.
            assert youngest is not sequence or len(self.running) > 1
            self.preempt(youngest)

    def preempt(self, sequence: Sequence) -> None:
        """Takes slot and pages away; the sequence is the next one to get some."""
        self.counters.preemptions += 1
        self._release(sequence)
        sequence.restart()
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended, wherever it is."""
        if sequence.slot is not None:
            self._release(sequence)
            sequence.restart()
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.held)
        del self.running[sequence.slot]
        self._free.append(sequence.slot)

    def everyone(self) -> list[Sequence]:
        """All sequences that have not ended."""
        return [*self.running.values(), *self.waiting]
