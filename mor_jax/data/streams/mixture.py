"""Weighted mixtures, decided by row number alone."""

from collections.abc import Sequence

import numpy as np

CYCLE = 10_000
"""Rows after which the order of sources repeats; weights are rounded to this share."""

ENDLESS = 2**60
"""Length of a mixture. Below the largest length that Python has, which grain's sums exceed."""


def shares_of(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers, at least one each, that add up to `total` in proportion to `weights`.

    Largest remainders get what rounding down leaves. `total` must not be below the number of
    weights.
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
    """Maps the number of a mixed row to (source, number of the row in that source's stream).

    Within a cycle of `CYCLE` rows each source appears as often as its weight says, at even
    distances. Counting goes on through the cycles, so each source is read in order and repeated
    whenever it is exhausted.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        counts = shares_of(weights, CYCLE)
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
        """How many of the first `rows` mixed rows are of each source."""
        cycles, rest = divmod(rows, CYCLE)
        over = np.bincount(self._owner[:rest], minlength=len(self._counts)).tolist()
        return [cycles * n + more for n, more in zip(self._counts, over, strict=True)]

    def __getitem__(self, index: int) -> tuple[int, int]:
        cycle, at = divmod(index, CYCLE)
        owner = self._owner[at]
        return owner, cycle * self._counts[owner] + self._rank[at]
