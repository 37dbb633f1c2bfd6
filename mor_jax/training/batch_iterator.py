"""Iterates over the batches of a run and tracks its position in the data."""

import time
from collections.abc import Callable

from mor_jax import data
from mor_jax.types import Batch


class BatchIterator:
    """Iterates batches; `position` the index of the next sequence, `waited` the last wait in s."""

    def __init__(self, begin: Callable[[], data.TrainBatches], position: int):
        """begin: opens the batches from sequence `position` on."""
        self._begin = begin
        self._batches: data.TrainBatches | None = None
        self.position, self.waited = position, 0.0

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Starts prefetching; otherwise the first `next` does."""
        if self._batches is None:
            self._batches = self._begin()

    def next(self) -> tuple[int, Batch]:
        """The next batch, with the index of its first sequence."""
        began = time.monotonic()
        self.open()
        assert self._batches is not None
        number, batch = self._batches.position, next(self._batches)
        self.position = self._batches.position
        self.waited = time.monotonic() - began
        return number, batch

    def close(self) -> None:
        """Stops the threads and processes that prefetch."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
