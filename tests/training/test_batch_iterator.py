"""Batches in order, with the number of their first row."""

import types

import numpy as np

from mor_jax.training import batch_iterator
from mor_jax.training.batch_iterator import BatchIterator
from mor_jax.types import Batch


class Numbers:
    """Stands for the batches of a corpus, two rows each: a batch holds the number of its first."""

    def __init__(self, start, log):
        self.position, self._log = start, log
        log.append(f"open {start}")

    def __next__(self):
        self.position += 2
        row = np.full((1, 2), self.position - 2, np.int32)
        return Batch(row, row)

    def close(self):
        self._log.append("close")


def test_batches_come_in_order_and_are_opened_once():
    log = []
    with BatchIterator(lambda: Numbers(3, log), 3) as feed:
        assert (feed.position, log) == (3, [])
        feed.open()
        for number in (3, 5, 7):
            assert feed.position == number
            got, batch = feed.next()
            assert got == batch.tokens[0, 0] == number
        assert feed.position == 9
    assert log == ["open 3", "close"]


def test_the_last_wait_is_told_and_holds_the_opening(monkeypatch):
    now, waits = [100.0], iter((3.0, 0.25, 0.0))
    monkeypatch.setattr(batch_iterator, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Numbers):
        def __next__(self):
            now[0] += next(waits)
            return super().__next__()

    def begin():
        now[0] += 10.0
        return Slow(0, [])

    with BatchIterator(begin, 0) as feed:
        assert feed.waited == 0
        seen = []
        for _ in range(3):
            feed.next()
            seen.append(feed.waited)
            now[0] += 50.0
    assert seen == [13.0, 0.25, 0.0]
