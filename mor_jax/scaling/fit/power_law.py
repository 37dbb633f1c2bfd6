"""Power laws of the best size and length over compute, with intervals, and their comparison.

Intervals come from a parametric bootstrap of the losses. A run's noise is taken as normal with
one standard deviation for the whole study: groups of four or five sizes are too small to resample
their residuals. It is the larger of two mean squares, those about the parabolas (which hold what
the parabola misses) and those between seeds. As few residuals estimate it poorly, every draw
scales it by an inverse chi-squared variable of their degrees of freedom, which makes intervals of
losses those of Student's t. Every draw then moves all parabolas, their minima and the laws through
them together. Runs count as independent. Budgets that are cut from one run are not: what they share
moves their minima alike, which leaves exponents better known than their intervals say, and sizes
at a given compute less well.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from mor_jax.scaling.fit.parabola import Group, Parabola

Interval = tuple[float, float]
"""Lower and upper end."""

_POINTS = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """deviation: of one run's loss, nats per token; None without repeats and residuals.

    freedom: its degrees of freedom. between_seeds: the deviation between seeds alone.
    seeds_freedom: repeated runs minus their cells.
    """

    deviation: float | None
    freedom: int
    between_seeds: float | None
    seeds_freedom: int


@dataclasses.dataclass(frozen=True)
class BootstrapDraws:
    """Resampled minima of one group, each (draws,). found: share with a minimum inside."""

    log_parameters: np.ndarray
    log_tokens: np.ndarray
    loss: np.ndarray
    found: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """N = k C^a and D = m C^b through the minima of one architecture, by least squares of the logs.

    budgets: number of minima. parameters_at, tokens_at: at the compute `at`, the geometric
    mean of the budgets; k and m, at C = 1, are far outside any study. scatter: root mean square of
    the minima about the law in ln N, None for two. band: rows of C and the ends of N and of D.
    """

    architecture: str
    budgets: int
    a: float
    a_interval: Interval | None
    b: float
    b_interval: Interval | None
    k: float
    m: float
    at: float
    parameters_at: float
    parameters_interval: Interval | None
    tokens_at: float
    tokens_interval: Interval | None
    scatter: float | None
    band: tuple[tuple[float, float, float, float, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlopeDifference:
    """Exponent of size `a` of one architecture minus that of another.

    verdict: `more size`, `more length` or `undecided`: what `architecture` puts more compute into
    than `against` as compute grows, where the interval leaves no doubt.
    """

    architecture: str
    against: str
    difference: float
    interval: Interval | None
    verdict: str


def noise(groups: Sequence[Group], parabolas: Sequence[Parabola]) -> Noise:
    """Noise of all runs of a study; the module docstring explains the estimate."""
    cells = [cell for group in groups for cell in group.cells if cell.spread is not None]
    seeds_freedom = sum(cell.runs - 1 for cell in cells)
    seeds = sum((cell.runs - 1) * (cell.spread or 0.0) ** 2 for cell in cells)
    fit_freedom = sum(fitted.freedom for fitted in parabolas)
    fit_squares = sum(fitted.squares for fitted in parabolas if fitted.freedom)
    between = math.sqrt(seeds / seeds_freedom) if seeds_freedom else None
    freedom, squares = fit_freedom + seeds_freedom, fit_squares + seeds
    if fit_freedom and between is not None and fit_squares / fit_freedom > between**2:
        # Repeats do not make the parabola a better description of the sizes.
        freedom, squares = fit_freedom, fit_squares
    deviation = math.sqrt(squares / freedom) if freedom else None
    return Noise(
        deviation=deviation, freedom=freedom, between_seeds=between, seeds_freedom=seeds_freedom
    )


def deviations(noise: Noise, draws: int, rng: np.random.Generator) -> np.ndarray | None:
    """The noise of each draw, (draws,): known no better than its degrees of freedom allow."""
    if not noise.deviation:
        return None
    return noise.deviation * np.sqrt(noise.freedom / rng.chisquare(noise.freedom, draws))


def resample(fitted: Parabola, scale: np.ndarray, rng: np.random.Generator) -> BootstrapDraws:
    """Minima of the parabola under noise `scale`, (draws,).

    A draw that bends down has its minimum at the lower end of the sizes' range; one far outside
    is held half a range beyond the sizes, where the study says nothing any more.
    """
    group = fitted.group
    runs = np.array([cell.runs for cell in group.cells], float)
    errors = rng.standard_normal((len(scale), len(runs))) * scale[:, None] / np.sqrt(runs)
    c0, c1, c2 = (fitted.coefficients + errors @ fitted.solve.T).T
    low, high = (end - fitted.centre for end in group.ends)
    margin = (high - low) / 2
    bends_up = c2 > 0
    vertex = -c1 / (2 * np.where(bends_up, c2, 1.0))
    lower_end = np.where((c1 + c2 * (low + high)) > 0, low, high)
    x = np.where(bends_up, np.clip(vertex, low - margin, high + margin), lower_end)
    inside = bends_up & (vertex > low) & (vertex < high)
    logs = fitted.centre + x
    loss = c0 + c1 * x + c2 * x * x
    return BootstrapDraws(logs, group.log_tokens(logs), loss, float(np.mean(inside)))


def interval(values: np.ndarray | None, confidence: float) -> Interval | None:
    """Percentiles that hold `confidence` of `values` between them."""
    if values is None:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class FittedLine:
    """y = offset + slope x through points, and resampled: (draws,) each, or None."""

    offset: float
    slope: float
    offsets: np.ndarray | None
    slopes: np.ndarray | None
    residuals: np.ndarray

    def at(self, x: float) -> float:
        """Value at x."""
        return float(self.offset + self.slope * x)

    def drawn(self, x: float) -> np.ndarray | None:
        """Resampled values at x."""
        return None if self.offsets is None else self.offsets + self.slopes * x


def line(x: np.ndarray, y: np.ndarray, drawn: np.ndarray | None) -> FittedLine:
    """Least squares through (x, y); drawn: (draws, points) of y.

    Where three or more points lie further from the line than their noise explains, the draws are
    widened by that factor, because a law is known no better than it fits its points.
    """
    basis = np.vander(x - x.mean(), 2, increasing=True)
    solve = np.linalg.pinv(basis)
    mean, slope = solve @ y
    residuals = y - basis @ (mean, slope)
    if drawn is None:
        return FittedLine(mean - slope * x.mean(), slope, None, None, residuals)
    means, slopes = solve @ drawn.T
    if len(x) > 2:
        expected = np.mean(np.sum((drawn.T - basis @ (solve @ drawn.T)) ** 2, axis=0))
        factor = math.sqrt(max(1.0, float(residuals @ residuals / expected))) if expected else 1.0
        means, slopes = mean + factor * (means - mean), slope + factor * (slopes - slope)
    offsets = means - slopes * x.mean()
    return FittedLine(mean - slope * x.mean(), slope, offsets, slopes, residuals)


def power_law(
    parabolas: Sequence[Parabola], draws: Sequence[BootstrapDraws] | None, confidence: float
) -> tuple[PowerLaw, np.ndarray | None]:
    """The law through two or more minima of one architecture, and its drawn exponents of size."""
    budgets = np.array([fitted.group.budget for fitted in parabolas])
    x = np.log(budgets)
    sizes = np.array([fitted.lowest for fitted in parabolas])
    lengths = np.array([float(p.group.log_tokens(np.array(p.lowest))) for p in parabolas])
    drawn = None if draws is None else np.stack([d.log_parameters for d in draws], axis=1)
    drawn_lengths = None if draws is None else np.stack([d.log_tokens for d in draws], axis=1)
    size, length = line(x, sizes, drawn), line(x, lengths, drawn_lengths)
    middle = float(x.mean())
    law = PowerLaw(
        architecture=parabolas[0].group.architecture,
        budgets=len(parabolas),
        a=float(size.slope),
        a_interval=interval(size.slopes, confidence),
        b=float(length.slope),
        b_interval=interval(length.slopes, confidence),
        k=math.exp(size.offset),
        m=math.exp(length.offset),
        at=math.exp(middle),
        parameters_at=math.exp(size.at(middle)),
        parameters_interval=powers(interval(size.drawn(middle), confidence)),
        tokens_at=math.exp(length.at(middle)),
        tokens_interval=powers(interval(length.drawn(middle), confidence)),
        scatter=float(np.sqrt(np.mean(size.residuals**2))) if len(x) > 2 else None,
        band=_band(x, size, length, confidence),
    )
    return law, size.slopes


def powers(ends: Interval | None) -> Interval | None:
    """e to the power of both ends."""
    return None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))


def _band(
    x: np.ndarray, size: FittedLine, length: FittedLine, confidence: float
) -> tuple[tuple[float, float, float, float, float], ...]:
    if size.slopes is None:
        return ()
    margin = 0.15 * (x.max() - x.min())
    rows = []
    for at in np.linspace(x.min() - margin, x.max() + margin, _POINTS):
        ends = (interval(law.drawn(float(at)), confidence) for law in (size, length))
        rows.append(tuple(math.exp(value) for value in (at, *itertools.chain(*ends))))
    return tuple(rows)


def differences(
    laws: Sequence[PowerLaw], slopes: Sequence[np.ndarray | None], confidence: float
) -> tuple[SlopeDifference, ...]:
    """Of every pair of architectures: the later one minus the earlier one."""
    result = []
    for (one, first), (two, second) in itertools.combinations(zip(laws, slopes, strict=True), 2):
        drawn = None if first is None or second is None else second - first
        ends = interval(drawn, confidence)
        verdict = "undecided"
        if ends is not None and (ends[0] > 0 or ends[1] < 0):
            verdict = "more size" if ends[0] > 0 else "more length"
        result.append(
            SlopeDifference(
                architecture=two.architecture,
                against=one.architecture,
                difference=two.a - one.a,
                interval=ends,
                verdict=verdict,
            )
        )
    return tuple(result)


__all__ = [
    "BootstrapDraws",
    "Interval",
    "Noise",
    "PowerLaw",
    "SlopeDifference",
    "deviations",
    "differences",
    "interval",
    "noise",
    "power_law",
    "powers",
    "resample",
]
