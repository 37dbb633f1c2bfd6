"""Depth and loss of groups of tokens: by position, token, frequency or loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import number
from mor_jax.analysis.routing_record import RoutingPass, RoutingRecord

POSITIONS = 16
TENTHS = 10


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Tokens in groups.

    statistic: name of the record, such as `position`. label: index of each token's group, -1 for
    none, int [n]. names: one per group. extra: further fields of each group's record.
    """

    statistic: str
    label: np.ndarray
    names: Sequence[str]
    extra: Sequence[dict[str, Any]]

    def records(self, routing: str, one: RoutingPass, recursions: int) -> list[dict[str, Any]]:
        """One record per group with tokens: count, mean depth, shares by depth, mean losses."""
        size, known = len(self.names), self.label >= 0
        label, depth = self.label[known], one.depth[known].astype(np.int64)
        table = np.bincount(label * (recursions + 1) + depth, minlength=size * (recursions + 1))
        table = table.reshape(size, recursions + 1)
        losses = {
            name: _means(label, getattr(one, name)[known], size) for name in ("loss", "ahead")
        }
        made = []
        for group in np.flatnonzero(table.sum(axis=1)):
            counts = table[group]
            found = {name: number(values[group]) for name, values in losses.items()}
            made.append(
                {
                    "statistic": self.statistic,
                    "routing": routing,
                    "group": self.names[group],
                    **self.extra[group],
                    "tokens": int(counts.sum()),
                    "depth": number(counts @ np.arange(recursions + 1) / counts.sum()),
                    "shares": [number(share, 4) for share in counts / counts.sum()],
                    **found,
                }
            )
        return made


def _means(label: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Mean of the finite values of each group, float64 [size]; NaN for a group without any."""
    fine = np.isfinite(values)
    total = np.bincount(label[fine], values[fine], minlength=size)
    with np.errstate(invalid="ignore"):
        return total / np.bincount(label[fine], minlength=size)


def by_position(observed: RoutingRecord) -> Buckets:
    """16 equal ranges of positions; one per position in a sequence of fewer than 16 tokens."""
    length = observed.rows.length
    edges = np.unique(np.linspace(0, length, min(POSITIONS, length) + 1).astype(int))
    label = np.searchsorted(edges, observed.position, side="right") - 1
    pairs = list(zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True))
    names = [f"{low}-{high}" if low < high else str(low) for low, high in pairs]
    extra = [{"low": low, "high": high} for low, high in pairs]
    return Buckets("position", label, names, extra)


def by_token(observed: RoutingRecord, texts: dict[int, str]) -> Buckets:
    """One group per token ID. texts: display name of each."""
    kinds, label = np.unique(observed.token, return_inverse=True)
    names = [texts[kind] for kind in kinds.tolist()]
    return Buckets("token", label, names, [{"token": kind} for kind in kinds.tolist()])


def by_loss(observed: RoutingRecord, one: RoutingPass, which: str) -> Buckets:
    """Deciles of the tokens by `loss` (of the token itself) or `ahead` (of the next token)."""
    values = getattr(one, which)
    fine = np.isfinite(values)
    statistic = {"loss": "loss", "ahead": "loss_ahead"}[which]
    if not fine.any():
        return Buckets(statistic, np.full(len(values), -1), [], [])
    edges = np.quantile(values[fine], np.linspace(0, 1, TENTHS + 1))
    label = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, TENTHS - 1)
    label = np.where(fine, label, -1)
    pairs = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    names = [f"{low:.2f}-{high:.2f}" for low, high in pairs]
    return Buckets(
        statistic,
        label,
        names,
        [{"low": number(low), "high": number(high)} for low, high in pairs],
    )


def by_frequency(observed: RoutingRecord, share: np.ndarray) -> Buckets:
    """Token types in order of frequency; each group covers about a tenth of the training text.

    A token type is never divided, so a common one may fill a group of its own. Types that the
    training text does not contain form the last group. share: of each token ID in that text,
    float [v].
    """
    order = np.argsort(-share, kind="stable")
    ordered = share[order]
    # A type belongs to the tenth that holds the middle of its cumulative share.
    middle = np.cumsum(ordered) - ordered / 2
    group = np.empty(len(share), int)
    group[order] = np.minimum((TENTHS * middle).astype(int), TENTHS - 1)
    group[share == 0] = TENTHS
    names, extra = [], []
    for number_of in range(TENTHS + 1):
        members = share[group == number_of]
        low, high = (members.min(), members.max()) if len(members) else (0.0, 0.0)
        names.append(_rarity(low, high, number_of == TENTHS - 1))
        found = {"low": number(low), "high": number(high), "share": number(members.sum())}
        extra.append({"kinds": len(members), **found})
    return Buckets("frequency", group[observed.token], names, extra)


def _rarity(low: float, high: float, last: bool) -> str:
    """`1 in 20-35`: training tokens per occurrence of the commonest and of the rarest type."""
    if low == 0:
        return "never"
    often, rare = f"{1 / high:,.0f}", f"{1 / low:,.0f}"
    if last and often != rare:
        return f"1 in {often} or fewer"
    return f"1 in {often}-{rare}" if often != rare else f"1 in {often}"
