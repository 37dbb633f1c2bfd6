"""Results of finished runs of a study: the points of fits and reports."""

import dataclasses
import math
from typing import Any

from etils import epath

from mor_jax.config.parsing import check
from mor_jax.files import read_json_lines

RESULTS = "results.jsonl"
"""File of a study with one JSON object per finished run."""

_MOST_LOSS = 1000.0
"""Nats per token. A run with a higher loss has diverged and cannot be fitted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One finished run.

    architecture: its name in the study, such as `plain` or `mor-3`. size: such as `w64` or `360m`.
    budget: planned FLOPs in the study's unit; runs of one budget are compared. flops: FLOPs spent,
    in the same unit. unique, effective: parameters without embedding and head, as stored and as if
    nothing were shared. tokens: training tokens. losses: nats per validation token; `loss_topk` is
    None for unrouted models.
    depth: mean recursions of a token under causal routing. seconds: of the run's own steps.
    """

    run: str
    architecture: str
    size: str
    budget: float
    seed: int
    unique: int
    effective: int
    tokens: int
    flops: float
    flops_per_token: float
    loss_causal: float
    loss_topk: float | None = None
    depth: float | None = None
    seconds: float | None = None

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Point":
        """Checks names and numbers. Raises `ValueError`, naming `where` and the value."""
        rule, fix = "must be an object with the values of a run", "Delete the line"
        check(isinstance(values, dict), "results", where, rule, fix)
        names = {field.name for field in dataclasses.fields(cls)}
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        fix = "Delete the line and collect the run again with mor isoflop status"
        missing, unknown = sorted(needed - values.keys()), sorted(values.keys() - names)
        check(not missing, where, sorted(values), f"lacks {missing}", fix)
        check(not unknown, where, unknown, "unknown values of a run", fix)
        for name, kind in (("run", str), ("architecture", str), ("size", str), ("seed", int)):
            value = values[name]
            check(type(value) is kind, f"{where}: {name}", value, f"must be a {kind.__name__}", fix)
        for name in ("budget", "flops", "flops_per_token", "unique", "effective", "tokens"):
            _finite(where, name, values[name], fix)
        for name in ("loss_causal", "loss_topk"):
            if name == "loss_causal" or values.get(name) is not None:
                rerun = f"Look into the run {values['run']}, then run it again or leave it out"
                _finite(where, name, values[name], rerun, _MOST_LOSS)
        for name in ("depth", "seconds"):
            value = values.get(name)
            ok = value is None or (type(value) in (int, float) and math.isfinite(value))
            check(ok, f"{where}: {name}", value, "must be a finite number or null", fix)
        return cls(**values)

    def loss(self, routing: str) -> float:
        """Under `causal` or `topk` routing; the one loss of an unrouted model for both."""
        if routing == "topk" and self.loss_topk is not None:
            return self.loss_topk
        return self.loss_causal

    def parameters(self, kind: str) -> int:
        """`unique` or `effective` parameters, without embedding and head."""
        return {"unique": self.unique, "effective": self.effective}[kind]


def _finite(where: str, name: str, value: Any, fix: str, most: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = number and math.isfinite(value) and 0 < value <= most
    rule = "must be a positive finite number" + (f" up to {most:g}" if most < math.inf else "")
    check(ok, f"{where}: {name}", value, rule, fix)


def read_points(study: epath.PathLike) -> list[Point]:
    """The points of a study, or of a results file, in the order of the lines.

    Raises `ValueError` if there are none, a line is damaged, a value is missing or not finite, or
    a run occurs twice with different values.
    """
    path = epath.Path(study)
    file = path / RESULTS if path.is_dir() else path
    fix = "Run the study first: mor isoflop run"
    check(file.exists(), "study", str(study), f"has no {RESULTS}, so no finished run", fix)
    found: dict[str, Point] = {}
    for number, values in read_json_lines(file, torn="none"):
        where = f"{file}:{number}"
        point = Point.from_dict(values, where)
        rule = f"run {point.run} occurs twice with different values"
        fix = "Keep the line that belongs to the current run"
        check(found.get(point.run, point) == point, "results", where, rule, fix)
        found[point.run] = point
    check(bool(found), "results", str(file), "holds no finished run", "Run the study first")
    return list(found.values())


__all__ = ["RESULTS", "Point", "read_points"]
