"""Progress of the runs of a study, and the results of the finished ones.

The state of a run is read from its directory, so it does not matter where it was started. Results
are appended to `results.jsonl`, one line per run, and stay there when the directories are deleted.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.checkpoint.checkpointer import complete_steps
from mor_jax.config.parsing import check
from mor_jax.files import write_atomic
from mor_jax.observability import metrics
from mor_jax.observability.event_log import FILE as EVENTS
from mor_jax.observability.event_log import read as read_events
from mor_jax.observability.goodput import goodput
from mor_jax.scaling.runs.points import RESULTS, Point, read_points
from mor_jax.scaling.study.manifest import Manifest, Run

RUNS = "runs"

_SAME = ("architecture", "size", "budget", "seed", "unique", "effective", "tokens", "flops")
"""Fields that a result shares with its run."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """State of one run.

    state: `done`, `started`, `new`, or `failed` with the problem. step: the last one logged. loss:
    validation loss under causal routing, nats per token.
    """

    run: Run
    state: str
    step: int = 0
    loss: float | None = None
    problem: str = ""


def directory(study: epath.PathLike, run: Run) -> epath.Path:
    """The workdir of a run."""
    return epath.Path(study) / RUNS / run.name


def known_points(study: epath.PathLike) -> dict[str, Point]:
    """The recorded results of a study, by run. Raises `ValueError` as `read_points`."""
    exists = (epath.Path(study) / RESULTS).exists()
    return {point.run: point for point in read_points(study)} if exists else {}


def progress(study: epath.PathLike, manifest: Manifest) -> list[Progress]:
    """State of every run, in the manifest's order; records new results.

    Raises:
        ValueError: the directory of a run has another configuration, or `results.jsonl` is damaged
            or belongs to another study.
    """
    found, new = _progress(study, manifest)
    if new:
        add(study, new)
    return found


def peek_progress(study: epath.PathLike, manifest: Manifest) -> list[Progress]:
    """The same without recording results: for a second process that only watches."""
    return _progress(study, manifest)[0]


def _progress(study: epath.PathLike, manifest: Manifest) -> tuple[list[Progress], list[Point]]:
    points = known_points(study)
    _check_points(study, manifest, points)
    found, new = [], []
    for run in manifest.runs:
        if run.name in points:
            found.append(Progress(run, "done", run.steps, points[run.name].loss_causal))
            continue
        state, point = _inspect(study, manifest, run)
        found.append(state)
        new += [] if point is None else [point]
    return found, new


def add(study: epath.PathLike, points: Sequence[Point]) -> None:
    """Appends results atomically: the whole file is replaced."""
    path = epath.Path(study) / RESULTS
    before = path.read_text() if path.exists() else ""
    lines = [json.dumps(dataclasses.asdict(point)) + "\n" for point in points]
    write_atomic(path, before + "".join(lines))


def _check_points(study: epath.PathLike, manifest: Manifest, points: dict[str, Point]) -> None:
    runs = {run.name: run for run in manifest.runs}
    where, fix = (
        f"{study}/{RESULTS}",
        "Delete these lines, or plan that study in a directory of its own",
    )
    other = sorted(points.keys() - runs.keys())
    rule = f"holds results of runs that are not in this study: {', '.join(other[:5])}"
    check(not other, "results", where, rule, fix)
    for name, point in points.items():
        for value in _SAME:
            found, planned = getattr(point, value), getattr(runs[name], value)
            rule = f"{name} has {value}={found!r}, the plan has {planned!r}: it is of another study"
            check(found == planned, "results", where, rule, fix)


def _inspect(study: epath.PathLike, manifest: Manifest, run: Run) -> tuple[Progress, Point | None]:
    """State of a run according to its directory, and its result if it is done."""
    path = directory(study, run)
    if not (path / run_dir.CONFIG_FILE).exists():
        return Progress(run, "new"), None
    _check_config(path, manifest, run)
    rows = metrics.read(path / metrics.FILE) if (path / metrics.FILE).exists() else []
    step = rows[-1]["step"] if rows else 0
    last = [row for row in rows if row["step"] == run.steps and "eval/loss_causal" in row]
    if not last or run.steps not in complete_steps(path):
        return Progress(run, "started", step), None
    try:
        point = _point(path, run, last[-1])
    except ValueError as error:
        # Reported like other failures: one bad run must not hide the results of the others.
        return Progress(run, "failed", step, problem=str(error)), None
    return Progress(run, "done", step, point.loss_causal), point


def _check_config(path: epath.Path, manifest: Manifest, run: Run) -> None:
    planned = manifest.config(run)
    existing = run_dir.read_config(path)
    changed = [str(tuple(change)) for change in run_dir.differences(existing, planned)]
    if existing.steps != planned.steps:
        changed.append(f"steps: {existing.steps} in the run, {planned.steps} planned")
    rule = f"the run in {path} is not the planned one: {'; '.join(changed)}"
    fix = "Move that directory away, or plan the study into a new directory"
    check(not changed, "run", run.name, rule, fix)


def _point(path: epath.Path, run: Run, last: dict[str, Any]) -> Point:
    """The result of a run. last: the metrics record of its last evaluation."""
    spent = goodput(read_events(path / EVENTS)) if (path / EVENTS).exists() else None
    values = {
        "run": run.name,
        "architecture": run.architecture,
        "size": run.size,
        "budget": run.budget,
        "seed": run.seed,
        "unique": run.unique,
        "effective": run.effective,
        "tokens": run.tokens,
        "flops": run.flops,
        "flops_per_token": run.flops_per_token,
        "loss_causal": last["eval/loss_causal"],
        "loss_topk": last.get("eval/loss_topk"),
        "depth": last.get("eval/depth_causal"),
        "seconds": None if spent is None else spent.seconds["training steps"],
    }
    return Point.from_dict(values, str(path / metrics.FILE))


__all__ = ["RUNS", "Progress", "add", "directory", "known_points", "peek_progress", "progress"]
