"""Minima per budget, the lowest runs, and the gaps between architectures."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mor_jax.scaling.fit.parabola import Group, Parabola
from mor_jax.scaling.fit.power_law import BootstrapDraws, Interval, interval, powers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minimum:
    """Lowest point of one parabola.

    sizes, runs: numbers behind it. parameters, tokens, loss: at the minimum, with intervals.
    coefficients: of loss = c0 + c1 x + c2 x^2, x = ln N - centre. found: share of the resamples
    that have a minimum between the smallest and the largest size. warning: a caveat.
    """

    architecture: str
    budget: float
    sizes: int
    runs: int
    parameters: float
    parameters_interval: Interval | None
    tokens: float
    tokens_interval: Interval | None
    loss: float
    loss_interval: Interval | None
    centre: float
    coefficients: tuple[float, float, float]
    found: float | None
    warning: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """Lowest measured loss of one architecture at one budget; spread: between its seeds."""

    architecture: str
    budget: float
    size: str
    parameters: float
    tokens: float
    runs: int
    loss: float
    spread: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Loss of an architecture minus the baseline's at one budget: below 0, it is better.

    at_minima: of the two parabolas' minima, None if one was refused. of_runs: of the two lowest
    losses measured, whose interval ignores that they were selected as the lowest.
    """

    architecture: str
    budget: float
    at_minima: float | None
    minima_interval: Interval | None
    of_runs: float
    runs_interval: Interval | None


def minimum(one: Parabola, drawn: BootstrapDraws | None, confidence: float) -> Minimum:
    """Lowest point of a parabola, with intervals from its draws."""
    group, lowest = one.group, one.lowest
    ends = (drawn.log_parameters, drawn.log_tokens, drawn.loss) if drawn else (None,) * 3
    sizes, tokens, loss = (interval(values, confidence) for values in ends)
    warnings = [one.edge()]
    if drawn is not None and drawn.found < confidence:
        warnings.append(f"only {drawn.found:.0%} of the resamples have a minimum inside")
    return Minimum(
        architecture=group.architecture,
        budget=group.budget,
        sizes=len(group.cells),
        runs=sum(cell.runs for cell in group.cells),
        parameters=math.exp(lowest),
        parameters_interval=powers(sizes),
        tokens=math.exp(float(group.log_tokens(np.array(lowest)))),
        tokens_interval=powers(tokens),
        loss=one.loss,
        loss_interval=loss,
        centre=one.centre,
        coefficients=tuple(float(value) for value in one.coefficients),
        found=None if drawn is None else drawn.found,
        warning="; ".join(text for text in warnings if text) or None,
    )


def best_of(group: Group) -> Best:
    """Lowest mean loss of the sizes of a group."""
    cell = min(group.cells, key=lambda cell: cell.loss)
    return Best(
        architecture=group.architecture,
        budget=group.budget,
        size=cell.size,
        parameters=cell.parameters,
        tokens=cell.tokens,
        runs=cell.runs,
        loss=cell.loss,
        spread=cell.spread,
    )


def gaps(
    best: Sequence[Best],
    pairs: Sequence[tuple[Parabola, BootstrapDraws | None]],
    baseline: str,
    drawing: tuple[np.ndarray | None, np.random.Generator, float],
) -> tuple[Gap, ...]:
    """Gap of every architecture to the baseline, wherever both have runs at a budget.

    drawing: noise of each draw or None, source of the draws, confidence.
    """
    scale, rng, confidence = drawing
    minima = {(one.group.architecture, one.group.budget): (one, drawn) for one, drawn in pairs}
    base = {row.budget: row for row in best if row.architecture == baseline}
    result = []
    for row in best:
        other = base.get(row.budget)
        if row.architecture == baseline or other is None:
            continue
        own, theirs = (minima.get((r.architecture, r.budget)) for r in (row, other))
        apart = between = None
        if own and theirs:
            apart = own[0].loss - theirs[0].loss
            if own[1] is not None and theirs[1] is not None:
                between = own[1].loss - theirs[1].loss
        drawn = None
        if scale is not None:
            width = scale * math.sqrt(1 / row.runs + 1 / other.runs)
            drawn = row.loss - other.loss + width * rng.standard_normal(len(scale))
        result.append(
            Gap(
                architecture=row.architecture,
                budget=row.budget,
                at_minima=apart,
                minima_interval=interval(between, confidence),
                of_runs=row.loss - other.loss,
                runs_interval=interval(drawn, confidence),
            )
        )
    return tuple(result)


__all__ = ["Best", "Gap", "Minimum", "best_of", "gaps", "minimum"]
