"""Errors between recomputed and recorded arrays, and the report of one case.

Errors are relative, with a norm that depends on the kind of array. A report has the largest error
of each group and the array it occurred in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.convert.parity.compacted_rows import first_compacted
from mor_jax.convert.parity.ties import Tie, find_ties
from mor_jax.models.routing.outputs import Routing
from mor_jax.types import Params

Group = Literal["outputs", "selections", "losses", "gradients", "trajectory"]

# The tolerances of float32 parity (relative). Selections must be equal.
TOLERANCES: dict[Group, float] = {
    "outputs": 1e-5,
    "selections": 0.0,
    "losses": 1e-6,
    "gradients": 1e-4,
    "trajectory": 1e-4,
}
# Losses below this are compared absolutely: accuracies and unused terms are often exactly 0.
SMALL_LOSS = 0.1
# Ties of a case that its line lists.
SHOWN = 3
# A gradient tensor this much smaller than the largest one is mostly rounding error.
FAINT = 1e-4


@dataclasses.dataclass
class Report:
    """Result of comparing one case.

    worst: group -> largest error and the array it occurred in. reason: why the case could not be
    compared, else None. ties: choices decided by rounding. affected: descriptions of the sequences
    that the bug `compacted_rows` changes. emulated: whether the case was computed with that bug.
    """

    name: str
    worst: dict[Group, tuple[float, str]] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    ties: list[Tie] = dataclasses.field(default_factory=list)
    affected: list[str] = dataclasses.field(default_factory=list)
    emulated: bool = False

    def add_routing(
        self, cfg: ModelConfig, params: Params, routing: Routing | None, step: int | None
    ):
        """Records the ties of a pass and the sequences that `compacted_rows` affects.

        step: number of the training forward pass, from 1; None: an evaluation.
        """
        if routing is None:
            return
        bias = params["router"].get("bias")
        self.ties += find_ties(cfg, routing, step, None if bias is None else np.asarray(bias))
        if routing.token is not None:
            when = "evaluation" if step is None else f"forward {step}"
            affected = first_compacted(np.asarray(routing.depth))
            self.affected += [f"{when}, row {row}, recursion {r + 1}" for r, row in affected]

    def add(self, group: Group, what: str, error: float | np.floating) -> None:
        """Adds the error of one array; NaN counts as infinite."""
        error = float("inf") if np.isnan(error) else float(error)
        if group not in self.worst or error > self.worst[group][0]:
            self.worst[group] = (error, what)

    @property
    def failures(self) -> list[str]:
        """Descriptions of the groups beyond their tolerance."""
        return [
            f"{group} {error:.1e} > {TOLERANCES[group]:g} at {what}"
            for group, (error, what) in self.worst.items()
            if error > TOLERANCES[group]
        ]

    @property
    def passed(self) -> bool:
        """Whether the case was compared and every group is within its tolerance."""
        return self.reason is None and bool(self.worst) and not self.failures

    def line(self) -> str:
        """The report as one line."""
        head = f"{'ok' if self.passed else 'FAIL':4} {self.name:28}"
        if self.reason is not None:
            return f"{head} {self.reason}"
        if not self.worst:
            return f"{head} the case has no arrays to compare with"
        parts = [self._part(group, error) for group, (error, _) in self.worst.items()]
        return f"{head} {'  '.join(parts + self.failures + self.notes)}"

    @property
    def notes(self) -> list[str]:
        """Ties and emulated bugs, as text."""
        notes = [str(tie) for tie in self.ties[:SHOWN]]
        if len(self.ties) > SHOWN:
            notes.append(f"and {len(self.ties) - SHOWN} more ties")
        if self.emulated:
            notes.append(f"with the reference's bug compacted_rows, from {self.affected[0]}")
        return notes

    @staticmethod
    def _part(group: Group, error: float) -> str:
        if group == "selections":
            return "selections " + ("equal  " if error == 0 else "differ ")
        return f"{group} {error:.1e}"


def _aligned(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray] | None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours, theirs) if ours.shape == theirs.shape else None


def by_magnitude(ours: Any, theirs: Any, floor: float = 0.0) -> float:
    """Largest difference divided by the largest recorded magnitude (at least `floor`).

    Infinite if the shapes differ; 0 for equal arrays of any magnitude.
    """
    pair = _aligned(ours, theirs)
    if pair is None:
        return float("inf")
    a, b = (array.astype(np.float64) for array in pair)
    difference = np.max(np.abs(a - b), initial=0.0)
    if difference == 0.0:
        return 0.0
    scale = max(np.max(np.abs(b), initial=0.0), floor)
    return float(difference / scale) if scale else float("inf")


def of_loss(ours: Any, theirs: Any) -> float:
    """Largest relative difference of a loss or of a vector of fractions."""
    return by_magnitude(ours, theirs, SMALL_LOSS)


def of_selection(ours: Any, theirs: Any) -> float:
    """0 if equal, else the number of different elements (infinite if the shapes differ)."""
    pair = _aligned(ours, theirs)
    return float("inf") if pair is None else float(np.sum(pair[0] != pair[1]))


def add_tensors(
    report: Report,
    group: Group,
    ours: Mapping[str, Any],
    theirs: Mapping[str, np.ndarray],
) -> None:
    """Compares tensors by name, relative to their own magnitude (with a floor from the largest)."""
    largest = max((np.max(np.abs(t), initial=0.0) for t in theirs.values()), default=0.0)
    for name, value in theirs.items():
        report.add(group, name, by_magnitude(ours[name], value, FAINT * float(largest)))
