"""Calibrates a run, measures the calibration and writes it (`mor calibrate`)."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mor_jax.calibration.calibrator import CalibrationPoint, CalibrationText, Calibrator
from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check
from mor_jax.evaluation import EvalRequest, config_for
from mor_jax.files import write_atomic
from mor_jax.inference.calibration_file import (
    Calibration,
    check_replaceable,
    fingerprint,
    path_of,
    save,
)
from mor_jax.inference.calibration_targets import takes_all, trained_shares, wanted_shares
from mor_jax.inference.config import compute_config
from mor_jax.inference.load_model import check_finite, is_causal
from mor_jax.inference.recursion_depth import with_recursions
from mor_jax.plotting import plots

MADE = "this calibration"

_MOST_POINTS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationTarget:
    """Target: shares of all tokens, or a mean depth; by default the target of training.

    points: number of depths of a curve to measure as well; None: no curve.
    """

    shares: tuple[float, ...] | None = None
    depth: float | None = None
    points: int | None = None

    def validate(self) -> None:
        """Raises `ValueError` for an invalid number of points."""
        rule = f"a curve needs at least 2 points, and at most {_MOST_POINTS}: each is measured"
        ok = self.points is None or 2 <= self.points <= _MOST_POINTS
        check(ok, "points", self.points, rule, "Try 9")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """A calibration and its measurements, with those of a requested curve, deepest first.

    length: tokens per sequence.
    """

    found: RunWeights
    calibration: Calibration
    points: tuple[CalibrationPoint, ...]
    length: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = {"workdir": str(self.found.path), "length": self.length}
        points = [{**dataclasses.asdict(point), "depth": point.depth} for point in self.points]
        return {**facts, **dataclasses.asdict(self.calibration), "points": points}

    def lines(self) -> list[str]:
        """A table for a terminal."""
        made = self.calibration
        width = max(len(point.name) for point in self.points) + 2
        columns = "  ".join(f"{f'rec. {r}':>6}" for r in range(made.recursions))
        head = f"{'':<{width}}{'mean depth':>10}{'loss':>9}{'work':>8}    {columns}"
        lines = [
            str(self.found),
            f"{made.text}: {made.tokens:,} tokens in sequences of {self.length}, "
            "and as many to measure",
            "",
            head,
        ]
        for point in self.points:
            each = "  ".join(f"{share:>6.1%}" for share in point.shares)
            lines.append(
                f"{point.name:<{width}}{point.depth:>10.3f}{point.loss:>9.4f}{point.work:>8.1%}"
                f"    {each}"
            )
        lines += ["", "loss: nats per token; work: FLOPs, 100% with all tokens at all recursions"]
        lines.append("rec. r: share of all tokens that go through recursion r")
        if any(point.name == Calibrator.TRAINING_RULE for point in self.points):
            lines.append("the training rule compares with later tokens, which generation cannot")
        return lines


def calibrate(found: RunWeights, asked: EvalRequest, aim: CalibrationTarget) -> CalibrationResult:
    """Calibrates the weights `found`; writes nothing.

    asked: the text, its sequences and batches (for each half), and recursions instead of the
    trained number.

    Raises:
        ValueError: the request does not fit the model or the text.
    """
    aim.validate()
    cfg = config_for(found.cfg, asked)
    number = cfg.model.num_recursions if asked.recursions is None else asked.recursions
    params = found.params()
    check_finite(params, str(found))
    # Rounding moves logits a little, so they are computed in the dtype of generation.
    model = compute_config(cfg.model, None)
    model, params, _ = with_recursions(model, params, number)
    Calibrator.check(model)
    wanted = wanted_shares(model, aim.shares, aim.depth)
    cfg = dataclasses.replace(cfg, model=model)
    text = CalibrationText.read(cfg, "heldout" if asked.sources is None else "all")
    calibrator = Calibrator(cfg, params, text)
    point = calibrator.calibrated(MADE, wanted)
    calibration = Calibration(
        weights=fingerprint(found),
        step=found.step,
        recursions=model.num_recursions,
        thresholds=point.thresholds,
        depth_bias=point.depth_bias,
        wanted=wanted,
        shares=point.shares,
        loss=point.loss,
        text=text.name,
        tokens=text.tokens,
    )
    points = (point, *_curve(calibrator, model, aim.points)) if aim.points else (point,)
    ordered = tuple(sorted(points, key=lambda point: point.depth, reverse=True))
    return CalibrationResult(
        found=found, calibration=calibration, points=ordered, length=cfg.seq_len
    )


def _curve(calibrator: Calibrator, model: ModelConfig, points: int) -> Iterator[CalibrationPoint]:
    """`points` depths from the least to all recursions, and the model's other routing modes."""
    lowest, highest = sum(takes_all(model)), model.num_recursions
    for depth in np.linspace(lowest, highest, points):
        name = "all recursions" if math.isclose(depth, highest) else f"depth {depth:.2f}"
        yield calibrator.calibrated(name, wanted_shares(model, depth=float(depth)))
    yield calibrator.calibrated("trained shares", trained_shares(model))
    if is_causal(model):
        yield calibrator.uncalibrated()
    yield calibrator.training_rule()


def check_name(found: RunWeights, name: str) -> None:
    """Raises `ValueError` unless a calibration may be saved as `name`; call it before the work."""
    path = path_of(found.path, name)
    check_replaceable(path)
    # Next to an existing calibration, these files are its curve.
    there = [] if path.exists() else [file.name for file in _curve_files(path) if file.exists()]
    rule = f"{there} would be replaced, but belong to no calibration"
    check(not there, "name", str(path), rule, "Choose another --name, such as 'fast' or FILE.json")


def write(measured: CalibrationResult, name: str) -> list[epath.Path]:
    """Writes the calibration `name` (or a file), and next to it the curve and its plot.

    Returns the files. Raises `ValueError` if they cannot be written.
    """
    path = path_of(measured.found.path, name)
    save(path, measured.calibration)
    curve, picture = _curve_files(path)
    if len(measured.points) == 1:
        # Files of an older calibration of this name would look like part of this one.
        for old in (curve, picture):
            old.unlink(missing_ok=True)
        return [path]
    rows = [json.dumps(point) + "\n" for point in measured.to_dict()["points"]]
    write_atomic(curve, "".join(rows))
    on = ("depth ", "all recursions")
    marks = [(p.name, p.depth, p.loss, p.name.startswith(on)) for p in measured.points]
    plots.depth_curve(marks, picture, title=f"Loss over depth: {measured.found}")
    return [path, curve, picture]


def _curve_files(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Files of the curve of the calibration at `path`, and of its plot."""
    return path.with_name(f"{path.stem}.curve.jsonl"), path.with_name(f"{path.stem}.curve.png")
