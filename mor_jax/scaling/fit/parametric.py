"""A second opinion on a study: L = E + A / N^alpha + B / D^beta through all runs at once.

Approach 3 of Hoffmann et al. (2022), arXiv 2203.15556, section 3.3: Huber loss of the difference
in log loss, written as a log-sum-exp, minimised by a quasi-Newton method from a grid of starts.
Besiroglu et al. (2024), arXiv 2404.10102, found that averages and loose tolerances stopped that fit
early: here it is a sum, in units of the Huber threshold, about the middle of the runs, with its
gradient. Starts come from a grid over the two exponents; the other three values follow from least
squares.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from mor_jax.scaling.fit.parabola import FitRefused, Group
from mor_jax.scaling.fit.power_law import Interval, interval

RUNS_NEEDED, BUDGETS_NEEDED, SIZES_NEEDED = 8, 2, 3

_DELTA = 1e-3
_EXPONENTS = (0.02, 2.5)
_STARTS, _GRID = 6, 16
_NAMES = ("A", "B", "E", "alpha", "beta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossLaw:
    """L = E + A / N^alpha + B / D^beta for one architecture.

    a, b: exponents of size and length over compute that follow from it. gamma: FLOPs per token
    grow as N^gamma between the sizes, so a = beta / (alpha + gamma beta) and b = 1 - gamma a; with
    gamma 1, FLOPs = k N D. parameters_at: best N at the compute `at`. error: median relative
    error of the losses. doubts: reasons not to trust it; empty if there are none.
    """

    architecture: str
    runs: int
    A: float
    B: float
    E: float
    alpha: float
    beta: float
    gamma: float
    a: float
    b: float
    at: float
    parameters_at: float
    intervals: dict[str, Interval]
    error: float
    doubts: tuple[str, ...]

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Nats per token of models of `parameters` parameters after `tokens` tokens."""
        size, length = self.A / parameters**self.alpha, self.B / tokens**self.beta
        return np.asarray(self.E + size + length)


@dataclasses.dataclass(frozen=True)
class _Runs:
    # Logs about their means, (runs,) each; the means belong to A and B.
    sizes: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    middle: tuple[float, float]


def loss_law(
    groups: Sequence[Group], resamples: int, confidence: float, rng: np.random.Generator
) -> LossLaw | FitRefused:
    """Fits all runs of the groups of one architecture, or reports what is missing.

    Intervals come from refitting losses about the fitted ones with normal noise in log loss. Its
    deviation is drawn too, as in `power_law`, from the residuals and the degrees of freedom left
    after five fitted values. The residuals themselves cannot be resampled: like a fit of absolute
    errors, this one passes through about five runs exactly. 0 resamples: no intervals.
    """
    cells = [cell for group in groups for cell in group.cells]
    sizes = len({cell.parameters for cell in cells})
    enough = len(cells) >= RUNS_NEEDED and len(groups) >= BUDGETS_NEEDED and sizes >= SIZES_NEEDED
    if not enough:
        have = f"{len(cells)} runs of {sizes} sizes at {len(groups)} budgets"
        need = f"{RUNS_NEEDED} of {SIZES_NEEDED} at {BUDGETS_NEEDED}"
        return FitRefused(
            architecture=groups[0].architecture,
            budget=None,
            what="parametric law",
            reason=f"it has {have} and needs {need}",
            fix="Run more sizes or budgets",
        )
    runs = _runs(groups)
    theta = _search(runs)
    gamma, rate = _flops(groups)
    at = math.exp(np.mean([math.log(group.budget) for group in groups]))
    values = _values(theta, runs, gamma, math.log(at / rate))
    drawn = [
        _values(t, runs, gamma, math.log(at / rate)) for t in _redraw(runs, theta, resamples, rng)
    ]
    columns = {name: np.array([d[name] for d in drawn]) for name in values if drawn}
    ends = {name: interval(column, confidence) for name, column in columns.items()}
    residuals = runs.losses - _predict(theta, runs)
    return LossLaw(
        architecture=groups[0].architecture,
        runs=len(cells),
        **values,
        gamma=gamma,
        b=1 - gamma * values["a"],
        at=at,
        intervals={name: pair for name, pair in ends.items() if pair is not None},
        error=float(np.median(np.abs(np.expm1(residuals)))),
        doubts=_doubts(theta, runs, drawn),
    )


def _runs(groups: Sequence[Group]) -> _Runs:
    cells = [cell for group in groups for cell in group.cells]
    sizes = np.log([cell.parameters for cell in cells])
    tokens = np.log([cell.tokens for cell in cells])
    middle = float(sizes.mean()), float(tokens.mean())
    losses = np.log([cell.loss for cell in cells])
    return _Runs(sizes - middle[0], tokens - middle[1], losses, middle)


def _flops(groups: Sequence[Group]) -> tuple[float, float]:
    # FLOPs per token = rate N^gamma, between the sizes.
    known = {cell.parameters: cell.flops_per_token for group in groups for cell in group.cells}
    gamma, offset = np.polyfit(np.log(list(known)), np.log(list(known.values())), 1)
    return float(gamma), math.exp(offset)


def _predict(theta: np.ndarray, runs: _Runs) -> np.ndarray:
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * runs.sizes, b - beta * runs.tokens, np.full_like(runs.sizes, e)])
    return np.logaddexp.reduce(terms, axis=0)


def _objective(theta: np.ndarray, runs: _Runs) -> tuple[float, np.ndarray]:
    # Sum of Huber losses in units of the threshold squared, and its gradient.
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * runs.sizes, b - beta * runs.tokens, np.full_like(runs.sizes, e)])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    total = parts.sum(axis=0)
    residuals = (top + np.log(total) - runs.losses) / _DELTA
    size = np.abs(residuals)
    value = np.where(size <= 1, 0.5 * residuals * residuals, size - 0.5).sum()
    pull = np.clip(residuals, -1, 1) / _DELTA * (parts / total)
    slopes = (-(pull[0] @ runs.sizes), -(pull[1] @ runs.tokens))
    return float(value), np.array([*pull.sum(axis=1), *slopes])


def _bounds(runs: _Runs) -> list[tuple[float, float]]:
    # No term exceeds the loss; one below a thousandth of it is negligible.
    high = float(runs.losses.max())
    return [(high - 7, high + 1)] * 2 + [(high - 7, float(runs.losses.min()))] + [_EXPONENTS] * 2


def _descend(start: np.ndarray, runs: _Runs) -> tuple[float, np.ndarray]:
    # L-BFGS-B finds the same minima, but scipy's wakes all cores for matrices of a few numbers.
    options = {"maxiter": 1000, "ftol": 1e-12}
    result = optimize.minimize(
        _objective, start, (runs,), "SLSQP", jac=True, bounds=_bounds(runs), options=options
    )
    return float(result.fun), result.x


def _search(runs: _Runs) -> np.ndarray:
    starts = _starts(runs)
    results = [_descend(start, runs) for start in starts]
    return min(results, key=lambda result: result[0])[1]


def _starts(runs: _Runs) -> list[np.ndarray]:
    # For given exponents the law is linear in the rest: the best few pairs of a grid.
    bounds = np.array(_bounds(runs))
    losses = np.exp(runs.losses)
    candidates = []
    for alpha in np.geomspace(0.05, 1.5, _GRID):
        for beta in np.geomspace(0.05, 1.5, _GRID):
            columns = [
                np.exp(-alpha * runs.sizes),
                np.exp(-beta * runs.tokens),
                np.ones_like(losses),
            ]
            parts, error = optimize.nnls(np.stack(columns, axis=1), losses)
            logs = np.log(np.maximum(parts, 1e-12))
            candidates.append((error, np.clip([*logs, alpha, beta], bounds[:, 0], bounds[:, 1])))
    candidates.sort(key=lambda pair: pair[0])
    # Neighbours on the grid lead to the same minimum: take every third.
    return [start for _, start in candidates[: 3 * _STARTS : 3]]


def _redraw(
    runs: _Runs, theta: np.ndarray, resamples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    fitted = _predict(theta, runs)
    freedom = len(fitted) - len(theta)
    squares = float(np.sum((runs.losses - fitted) ** 2))
    drawn = []
    for _ in range(resamples):
        scale = math.sqrt(squares / rng.chisquare(freedom))
        losses = fitted + scale * rng.standard_normal(len(fitted))
        drawn.append(_descend(theta, dataclasses.replace(runs, losses=losses))[1])
    return drawn


def _values(theta: np.ndarray, runs: _Runs, gamma: float, ratio: float) -> dict[str, float]:
    # ratio: ln of compute over rate, so that D = exp(ratio) / N^gamma.
    a, b, e, alpha, beta = (float(value) for value in theta)
    log_a, log_b = a + alpha * runs.middle[0], b + beta * runs.middle[1]
    total = alpha + gamma * beta
    best = (log_a + math.log(alpha) - log_b - math.log(gamma * beta) + beta * ratio) / total
    values = (math.exp(log_a), math.exp(log_b), math.exp(e), alpha, beta)
    named = dict(zip(_NAMES, values, strict=True))
    return named | {"a": beta / total, "parameters_at": math.exp(min(best, 700.0))}


def _doubts(theta: np.ndarray, runs: _Runs, drawn: Sequence[dict]) -> tuple[str, ...]:
    doubts = []
    for name, value, (low, high) in zip(_NAMES, theta, _bounds(runs), strict=True):
        if min(value - low, high - value) < 1e-3 * (high - low):
            doubts.append(f"{name} is at its bound")
    if len(runs.losses) < 2 * len(theta):
        doubts.append(f"{len(runs.losses)} runs are few for {len(theta)} values")
    edges = [d for d in drawn if not 1.05 * _EXPONENTS[0] < min(d["alpha"], d["beta"])]
    edges += [d for d in drawn if max(d["alpha"], d["beta"]) > 0.98 * _EXPONENTS[1]]
    if len(edges) > 0.1 * len(drawn):
        share = len(edges) / len(drawn)
        doubts.append(f"{share:.0%} of the resamples put an exponent at its bound")
    return tuple(doubts)


__all__ = ["LossLaw", "loss_law"]
