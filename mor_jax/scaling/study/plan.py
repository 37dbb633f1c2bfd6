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
"""What follows from flags, so that a value of the user's would be lost."""

_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What to plan.

    sizes: names or widths, see `architectures`. budgets: FLOPs in `unit`. seeds: of every point.
    noise: `SIZE@BUDGET`, where each architecture runs with `noise_seeds` seeds. drop: points
    `SIZE@BUDGET` to leave out. overrides: dotted settings of every run. speed: FLOP/s that a device
    is expected to reach; None: no expectation of time.
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


def make_plan(asked: StudyRequest, folder: Path) -> Manifest:
    """The manifest of a study; `folder` holds the shipped configurations.

    Raises:
        ValueError: an architecture, size, budget or setting does not fit, a budget is too small for
            a size, or the sizes of a budget cannot have the minimum between them.
    """
    _check_lists(asked)
    _check_overrides(asked)
    architectures = [Architecture.parse(text, folder) for text in asked.architectures]
    _distinct("architectures", [found.name for found in architectures])
    made: list[Planned] = []
    for size in asked.sizes:
        configs = _configs(asked, architectures, size)
        for architecture, cfg in zip(architectures, configs, strict=True):
            model = Model(
                architecture=architecture.name,
                size=size,
                cfg=cfg,
                unit=asked.unit,
                rules=asked.rules,
                speed=asked.speed,
            )
            made += _points(asked, model)
    check_brackets([run for run, _ in made], asked.rules.tokens_per_parameter)
    rules = dataclasses.asdict(asked.rules) | dataclasses.asdict(asked.shapes)
    return assemble(asked.study, asked.unit, rules, code(folder.parent), made)


def _points(asked: StudyRequest, model: Model) -> list[Planned]:
    """All runs of a model: every budget and seed, and further seeds where noise is asked for."""
    size, found = model.size, []
    budgets = [b for b in sorted(asked.budgets) if not _named(asked.drop, size, b)]
    for seed in range(asked.seeds):
        found += family(model, budgets, seed)
    for budget in budgets:
        if asked.noise is not None and _named([asked.noise], size, budget):
            for seed in range(asked.seeds, asked.noise_seeds):
                found += family(model, [budget], seed)
    return found


def _configs(
    asked: StudyRequest, architectures: Sequence[Architecture], size: str
) -> list[TrainConfig]:
    """One configuration an architecture, all of one depth where the size is a width."""
    values = [found.config(size, asked.overrides).to_dict() for found in architectures]
    if is_width(size):
        layers = _common_depth(values, asked.shapes.wanted_layers(size), size)
        for tree in values:
            tree["model"] |= asked.shapes.settings(size, layers)
    return [TrainConfig.from_dict(tree) for tree in values]


def _common_depth(values: list[dict[str, Any]], wanted: float, size: str) -> int:
    for layers in sorted(range(1, int(2 * wanted) + 26), key=lambda count: abs(count - wanted)):
        if all(_has_depth(tree["model"], layers) for tree in values):
            return layers
    rule = f"the architectures have no common depth near {wanted:.0f} layers at this size"
    fail("architectures", size, rule, "Plan architectures with other sharing schemes separately")


def _has_depth(model: dict[str, Any], layers: int) -> bool:
    ends = 2 * model["sharing"].startswith("middle")
    middle = layers - ends
    return middle > 0 and middle % model["num_recursions"] == 0


def _check_lists(asked: StudyRequest) -> None:
    for name in ("architectures", "sizes", "budgets"):
        check(bool(getattr(asked, name)), name, getattr(asked, name), "is empty", "Give some")
        _distinct(name, getattr(asked, name))
    for budget in asked.budgets:
        check(0 < budget < float("inf"), "budgets", budget, "must be positive FLOPs", "Try 1e18")
    rule = f"must be in 1 .. {_MOST_SEEDS}; every point runs once per seed"
    check(0 < asked.seeds <= _MOST_SEEDS, "seeds", asked.seeds, rule, "Try 1")
    if asked.noise is not None:
        rule, number = f"must be at most {_MOST_SEEDS}", asked.noise_seeds
        check(number <= _MOST_SEEDS, "noise_seeds", number, rule, f"Try {asked.seeds + 2}")
        rule = f"must be more than seeds={asked.seeds}, which every point has"
        fix = f"Try {asked.seeds + 2}"
        check(asked.noise_seeds > asked.seeds, "noise_seeds", asked.noise_seeds, rule, fix)
    rule = "must be a positive finite number of FLOP/s"
    ok = asked.speed is None or 0 < asked.speed < float("inf")
    check(ok, "speed", asked.speed, rule, "Try 1e12, or leave it out")
    for point in (*asked.drop, *([asked.noise] if asked.noise else [])):
        known = any(_named([point], s, b) for s in asked.sizes for b in asked.budgets)
        rule = "is not a point of the study, SIZE@BUDGET"
        fix = f"Sizes are {', '.join(asked.sizes)}"
        check(known, "drop" if point in asked.drop else "noise", point, rule, fix)


def _check_overrides(asked: StudyRequest) -> None:
    decided = dict(_DECIDED)
    if asked.rules.lr is not None:
        decided["optim.lr"] = "--lr"
    if any(is_width(size) for size in asked.sizes):
        decided |= _SHAPE
    for setting, value in asked.overrides.items():
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
    found: dict[str, Any] = {"version": mor_jax.__version__, "commit": None, "clean": None}
    if (root / ".git").exists():
        found["commit"] = _git(root, "rev-parse", "HEAD")
        found["clean"] = not _git(root, "status", "--porcelain", "--untracked-files=no")
    return found


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


__all__ = ["Rules", "StudyRequest", "code", "make_plan"]
