"""Batches in order, and over a jump."""

import numpy as np
import pytest

from mor_jax.feed import Feed, beyond
from mor_jax.types import Batch


class Numbers:
    """Stands for the batches of a corpus: batch n is the number n."""

    def __init__(self, start, log):
        self.position, self._log = start, log
        log.append(f"open {start}")

    def __next__(self):
        self.position += 1
        row = np.full((1, 2), self.position - 1, np.int32)
        return Batch(row, row)

    def close(self):
        self._log.append("close")


def take(feed, count):
    """Numbers of the next batches, each also found inside its batch."""
    found = [feed.next() for _ in range(count)]
    assert all(batch.tokens[0, 0] == number for number, batch in found)
    return [number for number, _ in found]


def test_batches_come_in_order_and_those_of_a_jump_never():
    log = []
    with Feed(lambda start: Numbers(start, log), 3, [(5, 8)]) as feed:
        feed.open()
        assert take(feed, 2) == [3, 4]
        assert feed.position == 5
        assert take(feed, 2) == [8, 9]
        assert feed.position == 10
        assert feed.waited >= 0
    assert log == ["open 3", "close", "open 8", "close"]


def test_a_run_taken_up_before_or_inside_a_jump_lands_behind_it():
    log = []
    with Feed(lambda start: Numbers(start, log), 6, [(5, 8)]) as feed:
        assert take(feed, 1) == [8]
    assert log == ["open 8", "close"]


@pytest.mark.parametrize(("position", "lands"), [(4, 4), (5, 12), (7, 12), (8, 12), (12, 12)])
def test_a_jump_may_lead_into_another(position, lands):
    assert beyond(position, [(8, 12), (5, 8)]) == lands
