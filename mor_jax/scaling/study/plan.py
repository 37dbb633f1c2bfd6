"""From architectures, sizes and budgets to the manifest of a study."""

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mor_jax
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check, fail
from mor_jax.scaling.study.architectures import Architecture, Shapes, is_width
from mor_jax.scaling.study.budgets import Unit
from mor_jax.scaling.study.family import Model, Planned, Rules, assemble, family
from mor_jax.scaling.study.manifest import Manifest
from mor_jax.scaling.study.minimum_bracketing import check_brackets

_DECIDED = {
    "steps": "--budgets",
    "optim.schedule": "the plan, a trapezoid,",
    "optim.warmup_steps": "--warmup",
    "optim.decay_steps": "--decay",
    "checkpoint.max_to_keep": "--budgets",
    "checkpoint.keep_steps": "--decay",
    "model.num_recursions": "--architectures",
}
_SHAPE = {
    "model.hidden_size": "--sizes",
    "model.num_heads": "--head_dim",
    "model.num_kv_heads": "--head_dim",
    "model.head_dim": "--head_dim",
    "model.intermediate_size": "--sizes",
    "model.num_layers": "--layers",
}
"""Settings that follow from flags, so an override would be lost."""

_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What to plan.

    sizes: names or widths, see `architectures`. budgets: FLOPs in `unit`. seeds: of every point.
    noise: `SIZE@BUDGET`, where each architecture runs with `noise_seeds` seeds. drop: points
    `SIZE@BUDGET` to skip. overrides: dotted settings of every run. speed: FLOP/s that a device
    is expected to reach; None: no estimate of time.
    """

    study: str
    architectures: Sequence[str]
    sizes: Sequence[str]
    budgets: Sequence[float]
    unit: Unit = "training"
    seeds: int = 1
    noise: str | None = None
    noise_seeds: int = 3
    drop: Sequence[str] = ()
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    rules: Rules = dataclasses.field(default_factory=Rules)
    shapes: Shapes = dataclasses.field(default_factory=Shapes)
    speed: float | None = None


def make_plan(request: StudyRequest, folder: Path) -> Manifest:
    """The manifest of a study; `folder` holds the shipped configurations.

    Raises:
        ValueError: an architecture, size, budget or setting does not fit, a budget is too small for
            a size, or the sizes of a budget do not bracket the minimum.
    """
    _check_lists(request)
    _check_overrides(request)
    architectures = [Architecture.parse(text, folder) for text in request.architectures]
    _distinct("architectures", [architecture.name for architecture in architectures])
    planned: list[Planned] = []
    for size in request.sizes:
        configs = _configs(request, architectures, size)
        for architecture, cfg in zip(architectures, configs, strict=True):
            model = Model(
                architecture=architecture.name,
                size=size,
                cfg=cfg,
                unit=request.unit,
                rules=request.rules,
                speed=request.speed,
            )
            planned += _points(request, model)
    check_brackets([run for run, _ in planned], request.rules.tokens_per_parameter)
    rules = dataclasses.asdict(request.rules) | dataclasses.asdict(request.shapes)
    return assemble(request.study, request.unit, rules, code(folder.parent), planned)


def _points(request: StudyRequest, model: Model) -> list[Planned]:
    """All runs of a model: every budget and seed, and further seeds at the noise point."""
    size, runs = model.size, []
    budgets = [b for b in sorted(request.budgets) if not _named(request.drop, size, b)]
    for seed in range(request.seeds):
        runs += family(model, budgets, seed)
    for budget in budgets:
        if request.noise is not None and _named([request.noise], size, budget):
            for seed in range(request.seeds, request.noise_seeds):
                runs += family(model, [budget], seed)
    return runs


def _configs(
    request: StudyRequest, architectures: Sequence[Architecture], size: str
) -> list[TrainConfig]:
    """One configuration per architecture, all of one depth if the size is a width."""
    values = [each.config(size, request.overrides).to_dict() for each in architectures]
    if is_width(size):
        layers = _common_depth(values, request.shapes.target_layers(size), size)
        for tree in values:
            tree["model"] |= request.shapes.settings(size, layers)
    return [TrainConfig.from_dict(tree) for tree in values]


def _common_depth(values: list[dict[str, Any]], target: float, size: str) -> int:
    for layers in sorted(range(1, int(2 * target) + 26), key=lambda count: abs(count - target)):
        if all(_has_depth(tree["model"], layers) for tree in values):
            return layers
    rule = f"the architectures have no common depth near {target:.0f} layers at this size"
    fail("architectures", size, rule, "Plan architectures with other sharing schemes separately")


def _has_depth(model: dict[str, Any], layers: int) -> bool:
    ends = 2 * model["sharing"].startswith("middle")
    middle = layers - ends
    return middle > 0 and middle % model["num_recursions"] == 0


def _check_lists(request: StudyRequest) -> None:
    for name in ("architectures", "sizes", "budgets"):
        check(bool(getattr(request, name)), name, getattr(request, name), "is empty", "Give some")
        _distinct(name, getattr(request, name))
    for budget in request.budgets:
        check(0 < budget < float("inf"), "budgets", budget, "must be positive FLOPs", "Try 1e18")
    rule = f"must be in 1 .. {_MOST_SEEDS}; every point runs once per seed"
    check(0 < request.seeds <= _MOST_SEEDS, "seeds", request.seeds, rule, "Try 1")
    if request.noise is not None:
        rule, number = f"must be at most {_MOST_SEEDS}", request.noise_seeds
        check(number <= _MOST_SEEDS, "noise_seeds", number, rule, f"Try {request.seeds + 2}")
        rule = f"must be more than seeds={request.seeds}, which every point has"
        fix = f"Try {request.seeds + 2}"
        check(request.noise_seeds > request.seeds, "noise_seeds", request.noise_seeds, rule, fix)
    rule = "must be a positive finite number of FLOP/s"
    ok = request.speed is None or 0 < request.speed < float("inf")
    check(ok, "speed", request.speed, rule, "Try 1e12, or leave it out")
    for point in (*request.drop, *([request.noise] if request.noise else [])):
        known = any(_named([point], s, b) for s in request.sizes for b in request.budgets)
        rule = "is not a point of the study, SIZE@BUDGET"
        fix = f"Sizes are {', '.join(request.sizes)}"
        check(known, "drop" if point in request.drop else "noise", point, rule, fix)


def _check_overrides(request: StudyRequest) -> None:
    decided = dict(_DECIDED)
    if request.rules.lr is not None:
        decided["optim.lr"] = "--lr"
    if any(is_width(size) for size in request.sizes):
        decided |= _SHAPE
    for setting, value in request.overrides.items():
        rule = f"cannot be overridden: {decided.get(setting)} decides it"
        check(setting not in decided, f"config.{setting}", value, rule, "Leave it out")


def _distinct(name: str, values: Sequence[Any]) -> None:
    again = [value for i, value in enumerate(values) if value in values[:i]]
    check(not again, name, list(values), f"repeats {again}", "Give each once")


def _named(points: Sequence[str], size: str, budget: float) -> bool:
    for point in points:
        named, at, flops_ = point.partition("@")
        try:
            if at and named == size and float(flops_) == budget:
                return True
        except ValueError as error:
            rule, fix = f"{flops_!r} is not a number of FLOPs", "Write it like w64@3e12"
            raise ValueError(f"point={point!r}: {rule}. {fix}") from error
    return False


def code(root: Path) -> dict[str, Any]:
    """Version and git commit of the code in `root`, and whether its files are as committed."""
    version: dict[str, Any] = {"version": mor_jax.__version__, "commit": None, "clean": None}
    if (root / ".git").exists():
        version["commit"] = _git(root, "rev-parse", "HEAD")
        version["clean"] = not _git(root, "status", "--porcelain", "--untracked-files=no")
    return version


def _git(root: Path, *words: str) -> str:
    result = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return result.stdout.strip()


__all__ = ["Rules", "StudyRequest", "code", "make_plan"]
