"""Results of a scaling study: minima per budget, power laws, comparisons and caveats."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from mor_jax.config.parsing import check
from mor_jax.files import write_atomic
from mor_jax.scaling.fit.minima import Best, Gap, Minimum, best_of, gaps, minimum
from mor_jax.scaling.fit.parabola import FitRefused, Group, Parabola, groups, parabola
from mor_jax.scaling.fit.parametric import LossLaw, loss_law
from mor_jax.scaling.fit.power_law import (
    Noise,
    PowerLaw,
    SlopeDifference,
    deviations,
    differences,
    noise,
    power_law,
    resample,
)
from mor_jax.scaling.runs.points import Point

Routing = Literal["causal", "topk"]
Kind = Literal["unique", "effective"]

FILE = "fit.json"

_WIDE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """baseline: architecture that the others are measured against; None: `plain`, or the first.

    resamples: of the intervals of parabolas and power laws. law_resamples: of the parametric law,
    which is far slower; 0: no intervals for it. confidence: level of the intervals. seed: of both.
    """

    baseline: str | None = None
    resamples: int = 4000
    law_resamples: int = 100
    confidence: float = 0.9
    seed: int = 0

    def __post_init__(self):
        """Raises `ValueError` for values that cannot give an interval."""
        fix = "Try 4000 resamples"
        check(self.resamples >= 100, "fit.resamples", self.resamples, "must be 100 or more", fix)
        rule, fix = "must be 0, or 50 or more", "Try 100"
        ok = self.law_resamples == 0 or self.law_resamples >= 50
        check(ok, "fit.law_resamples", self.law_resamples, rule, fix)
        rule, fix = "must be between 0.5 and 1", "Try 0.9"
        check(0.5 < self.confidence < 1, "fit.confidence", self.confidence, rule, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """All fits for one kind of parameters under one kind of routing."""

    routing: Routing
    kind: Kind
    noise: Noise
    groups: tuple[Group, ...]
    minima: tuple[Minimum, ...]
    refused: tuple[FitRefused, ...]
    laws: tuple[PowerLaw, ...]
    differences: tuple[SlopeDifference, ...]
    best: tuple[Best, ...]
    gaps: tuple[Gap, ...]
    parametric: tuple[LossLaw, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A study's fits. notes: caveats that apply to all views."""

    options: FitOptions
    architectures: tuple[str, ...]
    baseline: str
    budgets: tuple[float, ...]
    views: tuple[View, ...]
    notes: tuple[str, ...]

    def view(self, routing: str = "causal", kind: str = "unique") -> View:
        """One of `views`. Raises `ValueError` if it was not computed."""
        for view in self.views:
            if (view.routing, view.kind) == (routing, kind):
                return view
        computed = [(view.routing, view.kind) for view in self.views]
        raise ValueError(f"view={(routing, kind)!r}: was not computed. Choose one of {computed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `fit.json`."""
        return _plain(dataclasses.asdict(self))


def save(fit: Fit, folder: epath.Path) -> epath.Path:
    """Writes `fit.json`, atomically, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, json.dumps(fit.to_dict(), indent=1, allow_nan=False))
    return folder / FILE


def fit(points: Sequence[Point], options: FitOptions | None = None) -> Fit:
    """Fits a study; fits that cannot be made are listed as refused, the others are returned.

    Raises `ValueError` if there are no points or the baseline is not among them.
    """
    options = options or FitOptions()
    check(bool(points), "points", len(points), "has no finished run", "Run the study first")
    names = tuple(dict.fromkeys(point.architecture for point in points))
    baseline = options.baseline or ("plain" if "plain" in names else names[0])
    rule = "is not an architecture of the study"
    check(baseline in names, "fit.baseline", baseline, rule, f"Choose one of {list(names)}")
    ordered = sorted(points, key=lambda point: point.architecture != baseline)
    routed = any(point.loss_topk is not None for point in points)
    laws: dict[tuple[Group, ...], LossLaw | FitRefused] = {}
    views = tuple(
        _view(ordered, (routing, kind), baseline, options, laws)
        for routing in (("causal", "topk") if routed else ("causal",))
        for kind in ("unique", "effective")
    )
    return Fit(
        options=options,
        architectures=tuple(dict.fromkeys(point.architecture for point in ordered)),
        baseline=baseline,
        budgets=tuple(sorted({float(point.budget) for point in points})),
        views=views,
        notes=tuple(_notes(points, views[0], baseline)),
    )


def _view(
    points: Sequence[Point],
    of: tuple[Routing, Kind],
    baseline: str,
    options: FitOptions,
    known_laws: dict[tuple[Group, ...], LossLaw | FitRefused],
) -> View:
    routing, kind = of
    found = groups(points, routing, kind)
    tried = [parabola(group) for group in found]
    good = [one for one in tried if isinstance(one, Parabola)]
    refused = [one for one in tried if isinstance(one, FitRefused)]
    known = noise(found, good)
    rng = np.random.default_rng(options.seed)
    scale = deviations(known, options.resamples, rng)
    draws = [None if scale is None else resample(one, scale, rng) for one in good]
    pairs = list(zip(good, draws, strict=True))
    laws, slopes = [], []
    for name in dict.fromkeys(group.architecture for group in found):
        own = [(one, drawn) for one, drawn in pairs if one.group.architecture == name]
        if len(own) < 2:
            refused.append(_no_law(name, len(own), [g for g in found if g.architecture == name]))
            continue
        drawn = [d for _, d in own if d is not None] or None
        law, slope = power_law([one for one, _ in own], drawn, options.confidence)
        laws.append(law)
        slopes.append(slope)
    parametric = _parametric(found, options, known_laws)
    best = tuple(best_of(group) for group in found)
    return View(
        routing=routing,
        kind=kind,
        noise=known,
        groups=tuple(found),
        minima=tuple(minimum(one, drawn, options.confidence) for one, drawn in pairs),
        refused=(*refused, *(law for law in parametric if isinstance(law, FitRefused))),
        laws=tuple(laws),
        differences=differences(laws, slopes, options.confidence),
        best=best,
        gaps=gaps(best, pairs, baseline, (scale, rng, options.confidence)),
        parametric=tuple(law for law in parametric if isinstance(law, LossLaw)),
    )


def _no_law(name: str, minima: int, own: Sequence[Group]) -> FitRefused:
    reason = f"it has minima at {minima} of its {len(own)} budgets and needs 2"
    fix = "Add the sizes named at its budgets" if len(own) > 1 else "Run a second budget"
    return FitRefused(architecture=name, budget=None, what="power law", reason=reason, fix=fix)


def _parametric(
    found: Sequence[Group],
    options: FitOptions,
    known: dict[tuple[Group, ...], LossLaw | FitRefused],
) -> list[LossLaw | FitRefused]:
    laws = []
    for name in dict.fromkeys(group.architecture for group in found):
        own = tuple(group for group in found if group.architecture == name)
        # An architecture without sharing and routing is the same in every view.
        if own not in known:
            rng = np.random.default_rng(options.seed)
            known[own] = loss_law(own, options.law_resamples, options.confidence, rng)
        laws.append(known[own])
    return laws


def _notes(points: Sequence[Point], view: View, baseline: str) -> list[str]:
    notes = []
    if view.noise.deviation is None:
        notes.append(
            "there are no intervals: every parabola goes through all its points and no run was "
            "repeated with another seed. Run a fourth size, or more seeds"
        )
    elif view.noise.between_seeds is None:
        notes.append(
            "no run was repeated with another seed: the noise is estimated from the residuals of "
            "the parabolas"
        )
    for budget in sorted({point.budget for point in points}):
        names = {point.architecture for point in points if point.budget == budget}
        if baseline not in names:
            notes.append(f"{budget:.3g} FLOPs: no run of {baseline}, so nothing to compare with")
        elif len(names) == 1 and len({point.architecture for point in points}) > 1:
            notes.append(f"{budget:.3g} FLOPs: only {baseline} was run")
    off = [point for point in points if abs(point.flops / point.budget - 1) > 0.05]
    if off:
        worst = max(off, key=lambda point: abs(point.flops / point.budget - 1))
        share = worst.flops / worst.budget - 1
        notes.append(
            f"{len(off)} runs deviate from their budget by more than 5%, the most {worst.run} "
            f"({share:+.0%}): their losses are not strictly comparable"
        )
    spans = [math.exp(group.ends[1] - group.ends[0]) for group in view.groups]
    if max(spans) > _WIDE:
        notes.append(
            f"sizes of one budget span up to {max(spans):.0f}x: over more than {_WIDE}x a parabola "
            "misses the shape of the loss and shifts its minimum. Compare with the second opinion"
        )
    two = [law.architecture for law in view.laws if law.budgets == 2]
    if two:
        notes.append(
            f"{', '.join(two)}: a law through two budgets fits both exactly, so it is untested; "
            "its interval reflects only the noise of the runs"
        )
    return notes


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


__all__ = ["FILE", "Fit", "FitOptions", "View", "fit", "save"]
