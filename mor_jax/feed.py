"""The batches of a run in order, without those that a rollback decided to jump over."""

import time
from collections.abc import Callable, Sequence

from mor_jax import data
from mor_jax.types import Batch

Jump = tuple[int, int]
"""The first batch that is left out, and the one to go on with."""


class Feed:
    """Iterates batches; `position` is the number of the next one, `waited` the last wait in s."""

    def __init__(
        self, begin: Callable[[int], data.TrainBatches], position: int, jumps: Sequence[Jump] = ()
    ):
        """begin: opens the batches from a position on."""
        self._begin, self._jumps = begin, jumps
        self._batches: data.TrainBatches | None = None
        self.position, self.waited = position, 0.0

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Starts to read ahead; otherwise the first `next` does."""
        self._open(self.position)

    def next(self) -> tuple[int, Batch]:
        """The next batch with its number."""
        began = time.monotonic()
        target = beyond(self.position, self._jumps)
        if target != self.position or self._batches is None:
            self._open(target)
        assert self._batches is not None
        number, batch = self._batches.position, next(self._batches)
        self.position = self._batches.position
        self.waited = time.monotonic() - began
        return number, batch

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _open(self, position: int) -> None:
        self.close()
        self.position = beyond(position, self._jumps)
        self._batches = self._begin(self.position)


def beyond(position: int, jumps: Sequence[Jump]) -> int:
    """`position`, or where a jump from there leads."""
    for first, end in sorted(jumps):
        if first <= position < end:
            position = end
    return position
