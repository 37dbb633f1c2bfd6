"""Depth and loss of groups of tokens: by position, token, frequency or loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import rounded
from mor_jax.analysis.routing_record import RoutingPass, RoutingRecord

POSITION_RANGES = 16
DECILES = 10


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

    def records(
        self, routing: str, routing_pass: RoutingPass, recursions: int
    ) -> list[dict[str, Any]]:
        """One record per group with tokens: count, mean depth, shares by depth, mean losses."""
        size, labelled = len(self.names), self.label >= 0
        label, depth = self.label[labelled], routing_pass.depth[labelled].astype(np.int64)
        table = np.bincount(label * (recursions + 1) + depth, minlength=size * (recursions + 1))
        table = table.reshape(size, recursions + 1)
        losses = {
            name: _means(label, getattr(routing_pass, name)[labelled], size)
            for name in ("loss", "ahead")
        }
        records = []
        for group in np.flatnonzero(table.sum(axis=1)):
            counts = table[group]
            mean_losses = {name: rounded(values[group]) for name, values in losses.items()}
            records.append(
                {
                    "statistic": self.statistic,
                    "routing": routing,
                    "group": self.names[group],
                    **self.extra[group],
                    "tokens": int(counts.sum()),
                    "depth": rounded(counts @ np.arange(recursions + 1) / counts.sum()),
                    "shares": [rounded(share, 4) for share in counts / counts.sum()],
                    **mean_losses,
                }
            )
        return records


def _means(label: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Mean of the finite values of each group, float64 [size]; NaN for a group without any."""
    finite = np.isfinite(values)
    total = np.bincount(label[finite], values[finite], minlength=size)
    with np.errstate(invalid="ignore"):
        return total / np.bincount(label[finite], minlength=size)


def by_position(observed: RoutingRecord) -> Buckets:
    """16 equal ranges of positions; one per position in a sequence of fewer than 16 tokens."""
    length = observed.sequences.length
    edges = np.unique(np.linspace(0, length, min(POSITION_RANGES, length) + 1).astype(int))
    label = np.searchsorted(edges, observed.position, side="right") - 1
    pairs = list(zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True))
    names = [f"{low}-{high}" if low < high else str(low) for low, high in pairs]
    extra = [{"low": low, "high": high} for low, high in pairs]
    return Buckets("position", label, names, extra)


def by_token(observed: RoutingRecord, texts: dict[int, str]) -> Buckets:
    """One group per token ID. texts: display name of each."""
    token_types, label = np.unique(observed.token, return_inverse=True)
    names = [texts[token] for token in token_types.tolist()]
    return Buckets("token", label, names, [{"token": token} for token in token_types.tolist()])


def by_loss(observed: RoutingRecord, routing_pass: RoutingPass, which: str) -> Buckets:
    """Deciles of the tokens by `loss` (of the token itself) or `ahead` (of the next token)."""
    values = getattr(routing_pass, which)
    finite = np.isfinite(values)
    statistic = {"loss": "loss", "ahead": "loss_ahead"}[which]
    if not finite.any():
        return Buckets(statistic, np.full(len(values), -1), [], [])
    edges = np.quantile(values[finite], np.linspace(0, 1, DECILES + 1))
    label = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, DECILES - 1)
    label = np.where(finite, label, -1)
    pairs = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    names = [f"{low:.2f}-{high:.2f}" for low, high in pairs]
    return Buckets(
        statistic,
        label,
        names,
        [{"low": rounded(low), "high": rounded(high)} for low, high in pairs],
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
    group[order] = np.minimum((DECILES * middle).astype(int), DECILES - 1)
    group[share == 0] = DECILES
    names, extra = [], []
    for group_index in range(DECILES + 1):
        members = share[group == group_index]
        low, high = (members.min(), members.max()) if len(members) else (0.0, 0.0)
        names.append(_rarity(low, high, group_index == DECILES - 1))
        fields = {"low": rounded(low), "high": rounded(high), "share": rounded(members.sum())}
        extra.append({"kinds": len(members), **fields})
    return Buckets("frequency", group[observed.token], names, extra)


def _rarity(low: float, high: float, last: bool) -> str:
    """`1 in 20-35`: training tokens per occurrence of the commonest and of the rarest type."""
    if low == 0:
        return "never"
    often, rare = f"{1 / high:,.0f}", f"{1 / low:,.0f}"
    if last and often != rare:
        return f"1 in {often} or fewer"
    return f"1 in {often}-{rare}" if often != rare else f"1 in {often}"
