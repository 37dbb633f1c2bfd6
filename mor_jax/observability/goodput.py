"""Goodput: how much of a run's time went into training, over all of its starts."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mor_jax.observability.number_format import duration

# Event that takes time -> its use, in the first start of a run. In later starts, all time before
# the first step counts as restart.
_USES = {"eval": "evaluation", "save": "checkpoints", "finish": "finish"}
_STARTUP = {"assemble": "startup", "fresh": "startup", "open": "startup", "compile": "compile"}
_STARTUP["restore"] = "startup"

KINDS = (
    "training steps",
    "input",
    "evaluation",
    "checkpoints",
    "compile",
    "startup",
    "restarts",
    "finish",
    "other",
)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds by use (`KINDS`); their sum is the time in which processes of the run existed.

    restarts: time before the first step in every start but the first, and repeated steps.
    startup: the same in the first start, without compilation. finish: figures and a sample at the
    end. starts: number of starts. again: steps that were repeated.
    """

    seconds: dict[str, float]
    starts: int
    again: int

    @property
    def total(self) -> float:
        """Total seconds."""
        return sum(self.seconds.values())

    def share(self, kind: str) -> float:
        """Fraction of the total time, 0 .. 1."""
        return self.seconds[kind] / self.total if self.total else 0.0

    def line(self) -> str:
        """`goodput 84.1% of 3m20s in training steps; input 0.2%, ...`"""
        others = ", ".join(f"{kind} {self.share(kind):.1%}" for kind in KINDS[1:])
        starts = "1 start" if self.starts == 1 else f"{self.starts} starts"
        again = f", {self.again} steps done again" if self.again else ""
        return (
            f"goodput {self.share(KINDS[0]):.1%} of {duration(self.total)} in training steps; "
            f"{others} ({starts}{again})"
        )


def goodput(events: Sequence[dict[str, Any]]) -> Goodput:
    """Adds up an event log (`events.read`)."""
    seconds = dict.fromkeys(KINDS, 0.0)
    starts = _starts(events)
    for number, part in enumerate(starts):
        total = max((event["clock"] for event in part), default=0.0)
        uses = dict.fromkeys(KINDS, 0.0)
        for event in part:
            name = event["event"]
            use = ("restarts" if number else _STARTUP[name]) if name in _STARTUP else None
            use = use or _USES.get(name)
            if use:
                uses[use] += event["seconds"]
            elif name == "steps":
                uses["training steps"] += event["seconds"]
                uses["input"] += event["input"]
        uses["other"] = max(total - sum(uses.values()), 0.0)
        for kind, value in uses.items():
            seconds[kind] += value
    again, wasted = _again([event for part in starts for event in part])
    seconds["training steps"] -= wasted
    seconds["restarts"] += wasted
    return Goodput(seconds, len(starts), again)


def _starts(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    parts: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        parts.setdefault(event["start"], []).append(event)
    return [parts[number] for number in sorted(parts)]


def _again(events: Iterable[dict[str, Any]]) -> tuple[int, float]:
    """Steps undone by a later restore or rollback, and the seconds they took."""
    spans: list[tuple[int, int, float]] = []
    count, wasted = 0, 0.0
    for event in events:
        if event["event"] == "steps":
            spans.append((event["first"], event["last"], event["seconds"]))
        elif event["event"] in ("restore", "fresh", "rollback"):
            remaining, step = [], event["step"]
            for first, last, seconds in spans:
                undone = min(max(last - step, 0), last - first + 1)
                part = undone / (last - first + 1)
                count, wasted = count + undone, wasted + seconds * part
                if undone <= last - first:
                    remaining.append((first, last - undone, seconds * (1 - part)))
            spans = remaining
    return count, wasted


__all__ = ["KINDS", "Goodput", "goodput"]
