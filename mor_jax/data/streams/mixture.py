"""Weighted mixtures as a pure function of the sequence index."""

from collections.abc import Sequence

import numpy as np

CYCLE = 10_000
"""Period of the order of sources, in sequences; weights are rounded to multiples of 1/CYCLE."""

ENDLESS = 2**60
"""Length of a mixture: less than Python's largest length, which grain's arithmetic would exceed."""


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Integers of at least 1 with sum `total`, in proportion to `weights` (largest remainders).

    `total` must be at least the number of weights.
    """
    exact = np.array(weights, np.float64) / sum(weights) * total
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        gap = (exact - counts) * step
        gap[counts + step < 1] = -np.inf
        counts[np.argmax(gap)] += step
    return counts


class Mixture:
    """Maps the index of a mixed sequence to (source, index of the sequence in that source).

    In a cycle of `CYCLE` sequences each source occurs in proportion to its weight, evenly spaced.
    Indices continue across cycles, so each source is read in order, and repeated when exhausted.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        counts = apportion(weights, CYCLE)
        ideal = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        owner = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(n) for n in counts])
        order = np.lexsort((owner, ideal))
        self._counts = counts.tolist()
        self._owner = owner[order].tolist()
        self._rank = ranks[order].tolist()

    def __len__(self) -> int:
        return ENDLESS

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` mixed sequences come from each source."""
        cycles, rest = divmod(rows, CYCLE)
        over = np.bincount(self._owner[:rest], minlength=len(self._counts)).tolist()
        return [cycles * n + more for n, more in zip(self._counts, over, strict=True)]

    def __getitem__(self, index: int) -> tuple[int, int]:
        cycle, at = divmod(index, CYCLE)
        owner = self._owner[at]
        return owner, cycle * self._counts[owner] + self._rank[at]
