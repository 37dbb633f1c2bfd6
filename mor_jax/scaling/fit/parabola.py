"""Parabolas of loss in ln N: one per architecture and budget, and where its minimum lies.

Approach 2 of Hoffmann et al. (2022), arXiv 2203.15556, section 3.2, with three differences. A
parabola without a minimum inside the sizes that were run is rejected instead of extrapolated. The
tokens at the minimum are the budget over the FLOPs per token there, interpolated between the runs
in ln N, not C / 6N: in models that route or share, FLOPs per token are not 6N. Repeated runs of
one size count as one point, with their number as its weight.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mor_jax.observability.number_format import quantity
from mor_jax.scaling.runs.points import Point

SIZES_NEEDED = 3
"""Different sizes that a parabola needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs of one architecture, budget and size, which differ by their seeds.

    parameters: of the kind that the fit is over. loss: mean, nats per token. spread: standard
    deviation between seeds, None for one run. tokens, flops, flops_per_token: means.
    """

    size: str
    parameters: float
    runs: int
    loss: float
    spread: float | None
    tokens: float
    flops: float
    flops_per_token: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Cells of one architecture at one budget, by rising parameters."""

    architecture: str
    budget: float
    cells: tuple[Cell, ...]

    @property
    def logs(self) -> np.ndarray:
        """ln N of the cells, (cells,)."""
        return np.log([cell.parameters for cell in self.cells])

    @property
    def ends(self) -> tuple[float, float]:
        """ln N of the smallest and the largest size."""
        return float(self.logs[0]), float(self.logs[-1])

    def log_tokens(self, logs: np.ndarray) -> np.ndarray:
        """ln D that the budget pays for at ln N `logs`, of any shape.

        ln FLOPs per token is interpolated linearly, and extrapolated from the last two sizes.
        """
        known, rates = self.logs, np.log([cell.flops_per_token for cell in self.cells])
        distinct = np.concatenate([[True], np.diff(known) > 0])
        known, rates = known[distinct], rates[distinct]
        left = np.clip(np.searchsorted(known, logs) - 1, 0, len(known) - 2)
        slope = (rates[left + 1] - rates[left]) / (known[left + 1] - known[left])
        return np.asarray(math.log(self.budget) - rates[left] - slope * (logs - known[left]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitRefused:
    """A fit that was not made. budget: None if it spans all budgets of the architecture."""

    architecture: str
    budget: float | None
    what: str
    reason: str
    fix: str

    def line(self) -> str:
        """One line: what, why, and what to do."""
        where = "" if self.budget is None else f" at {self.budget:.3g} FLOPs"
        return f"{self.architecture}{where}: no {self.what}: {self.reason}. {self.fix}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss = c0 + c1 x + c2 x^2 with x = ln N - centre, by least squares.

    coefficients: c0, c1, c2. solve: (3, cells), maps losses to coefficients. squares: weighted
    squared residuals. freedom: cells minus 3.
    """

    group: Group
    centre: float
    coefficients: np.ndarray
    solve: np.ndarray
    squares: float
    freedom: int

    @property
    def lowest(self) -> float:
        """ln N of the minimum."""
        _, c1, c2 = self.coefficients
        return float(self.centre - c1 / (2 * c2))

    @property
    def loss(self) -> float:
        """Loss at the minimum."""
        return float(self.at(np.array(self.lowest)))

    def at(self, logs: np.ndarray) -> np.ndarray:
        """Loss at ln N `logs`."""
        x = logs - self.centre
        c0, c1, c2 = self.coefficients
        return np.asarray(c0 + c1 * x + c2 * x * x)

    def edge(self) -> str | None:
        """A warning if the lowest loss is at the smallest or largest size."""
        cells = self.group.cells
        best = min(cells, key=lambda cell: cell.loss)
        if best is cells[0] or best is cells[-1]:
            return f"the lowest loss is at the {'smallest' if best is cells[0] else 'largest'} size"
        return None


def groups(points: Sequence[Point], routing: str, kind: str) -> list[Group]:
    """Groups in the order of their architectures' first runs, then by budget."""
    order = {name: i for i, name in enumerate(dict.fromkeys(p.architecture for p in points))}
    keys = sorted({(order[p.architecture], p.budget, p.architecture) for p in points})
    result = []
    for _, budget, name in keys:
        own = [p for p in points if p.architecture == name and p.budget == budget]
        sizes = dict.fromkeys((p.size, p.parameters(kind)) for p in own)
        cells = [
            _cell([p for p in own if (p.size, p.parameters(kind)) == key], routing, kind)
            for key in sizes
        ]
        cells.sort(key=lambda cell: cell.parameters)
        result.append(Group(architecture=name, budget=float(budget), cells=tuple(cells)))
    return result


def _cell(runs: Sequence[Point], routing: str, kind: str) -> Cell:
    losses = [run.loss(routing) for run in runs]
    return Cell(
        size=runs[0].size,
        parameters=float(runs[0].parameters(kind)),
        runs=len(runs),
        loss=float(np.mean(losses)),
        spread=float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        tokens=float(np.mean([run.tokens for run in runs])),
        flops=float(np.mean([run.flops for run in runs])),
        flops_per_token=float(np.mean([run.flops_per_token for run in runs])),
    )


def parabola(group: Group) -> Parabola | FitRefused:
    """Fits one group, or reports why the fit is unreliable and which sizes would help."""
    logs = group.logs
    distinct = len(np.unique(logs))
    if distinct < SIZES_NEEDED:
        have = "one size" if distinct == 1 else f"{distinct} different sizes"
        reason = f"it has runs of {have} and needs {SIZES_NEEDED}"
        return _refuse(group, reason, "Run more sizes, on both sides of the lowest loss")
    weights = np.array([cell.runs for cell in group.cells], float)
    centre = float(np.mean(logs))
    basis = np.vander(logs - centre, 3, increasing=True)
    solve = np.linalg.solve(basis.T @ (weights[:, None] * basis), basis.T * weights)
    losses = np.array([cell.loss for cell in group.cells])
    coefficients = solve @ losses
    residuals = losses - basis @ coefficients
    fitted = Parabola(
        group=group,
        centre=centre,
        coefficients=coefficients,
        solve=solve,
        squares=float(weights @ residuals**2),
        freedom=len(logs) - 3,
    )
    return _outside(fitted) or fitted


def _outside(fitted: Parabola) -> FitRefused | None:
    group = fitted.group
    low, high = group.ends
    smallest, largest = (_name(cell) for cell in (group.cells[0], group.cells[-1]))
    if fitted.coefficients[2] <= 0:
        reason = "its loss is concave in ln N, so it has no minimum"
        fix = f"Run sizes beyond {smallest} and {largest}, or more seeds of these"
        return _refuse(group, reason, fix)
    if low < fitted.lowest < high:
        return None
    below = fitted.lowest <= low
    end, side = (smallest, "below") if below else (largest, "above")
    step = (high - low) / (len(group.cells) - 1)
    # A vertex far outside says little about the minimum: suggest at most two steps beyond.
    first = max(fitted.lowest, low - step) if below else min(fitted.lowest, high + step)
    suggested = sorted((first, first - step if below else first + step))
    sizes = " and ".join(quantity(math.exp(x)) for x in suggested)
    where = quantity(math.exp(min(max(fitted.lowest, low - 5), high + 5)))
    reason = f"its minimum lies near {where} parameters, {side} the sizes run ({end})"
    return _refuse(group, reason, f"Add sizes of about {sizes} parameters")


def _name(cell: Cell) -> str:
    return f"{cell.size}, {quantity(cell.parameters)}"


def _refuse(group: Group, reason: str, fix: str) -> FitRefused:
    return FitRefused(
        architecture=group.architecture,
        budget=group.budget,
        what="parabola",
        reason=reason,
        fix=fix,
    )


__all__ = ["SIZES_NEEDED", "Cell", "FitRefused", "Group", "Parabola", "groups", "parabola"]
