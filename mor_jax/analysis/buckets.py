"""Depths and losses of groups of tokens: by position, by token, by frequency, by loss."""

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

    statistic: name of the record, such as `position`. label: group of each token, -1 for none,
    int [n]. names: of the groups. extra: more fields of each group's record.
    """

    statistic: str
    label: np.ndarray
    names: Sequence[str]
    extra: Sequence[dict[str, Any]]

    def records(self, routing: str, one: RoutingPass, recursions: int) -> list[dict[str, Any]]:
        """A record a group that has tokens: how many, mean depth, shares by depth, losses."""
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
    """Mean of the finite values of each group, float64 [size]; NaN where it has none."""
    fine = np.isfinite(values)
    total = np.bincount(label[fine], values[fine], minlength=size)
    with np.errstate(invalid="ignore"):
        return total / np.bincount(label[fine], minlength=size)


def by_position(observed: RoutingRecord) -> Buckets:
    """16 equal stretches of the row, fewer in shorter rows."""
    length = observed.rows.length
    edges = np.unique(np.linspace(0, length, min(POSITIONS, length) + 1).astype(int))
    label = np.searchsorted(edges, observed.position, side="right") - 1
    pairs = list(zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True))
    names = [f"{low}-{high}" if low < high else str(low) for low, high in pairs]
    extra = [{"low": low, "high": high} for low, high in pairs]
    return Buckets("position", label, names, extra)


def by_token(observed: RoutingRecord, texts: dict[int, str]) -> Buckets:
    """Each token number. texts: what people see of it."""
    kinds, label = np.unique(observed.token, return_inverse=True)
    names = [texts[kind] for kind in kinds.tolist()]
    return Buckets("token", label, names, [{"token": kind} for kind in kinds.tolist()])


def by_loss(observed: RoutingRecord, one: RoutingPass, which: str) -> Buckets:
    """Tenths of equally many tokens by `loss` (of the token) or `ahead` (of the next one)."""
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
    """Kinds of tokens in order of frequency, each group about a tenth of the training text.

    A kind is not divided, so common ones may fill groups of their own. Those that the training text
    does not have come last. share: of each token number in it, float [v].
    """
    order = np.argsort(-share, kind="stable")
    ordered = share[order]
    # By the middle of what each kind takes up of the text.
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
    """`1 in 20-35`: tokens of training text for one of the commonest and of the rarest kind."""
    if low == 0:
        return "never"
    often, rare = f"{1 / high:,.0f}", f"{1 / low:,.0f}"
    if last and often != rare:
        return f"1 in {often} or fewer"
    return f"1 in {often}-{rare}" if often != rare else f"1 in {often}"
