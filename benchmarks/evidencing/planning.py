"""The manifest of the evidence: equal tokens and equal FLOPs, cut from one schedule."""

from pathlib import Path

from evidencing.variants import ABLATIONS, MAIN, WIDTH, Variant
from mor_jax.config import TrainConfig
from mor_jax.scaling.study.architectures import Architecture, Shapes
from mor_jax.scaling.study.budgets import flops_per_token
from mor_jax.scaling.study.family import Model, Planned, Rules, assemble, family
from mor_jax.scaling.study.manifest import Manifest
from mor_jax.scaling.study.plan import code

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = Rules(lr=6e-3, lr_width=32, lr_power=1.0)
SHAPES = Shapes(head_dim=8, layers=8)
SETTINGS = {
    "batch_size": 4,
    "eval.interval": None,
    "eval.batches": 32,
    "eval.completion_tokens": 0,
    "checkpoint.interval": None,
}


def make(steps: int, seeds: int, ablation_seeds: int) -> Manifest:
    """All runs: the plain model takes `steps` steps, the others as many tokens or FLOPs."""
    budget = steps * _cost(model(MAIN[0], steps))
    planned: list[Planned] = []
    for variant in MAIN:
        planned += _runs(model(variant, steps), steps, budget, range(seeds))
    known = {variant.name for variant in MAIN}
    for group in ABLATIONS.values():
        for variant in group:
            if variant.name not in known:
                one = model(variant, steps)
                planned += _runs(one, steps, None, range(ablation_seeds))
    rules = {"steps": steps, "equal_flops": budget}
    rules |= {"lr": RULES.lr, "lr_width": RULES.lr_width, "lr_power": RULES.lr_power}
    rules |= {"warmup": RULES.warmup, "decay": RULES.decay}
    return assemble("evidence", "training", rules, code(ROOT), planned)


def model(variant: Variant, steps: int) -> Model:
    """A variant at the one width of the evidence."""
    found = Architecture(variant.name, ROOT / "configs" / f"{variant.file}.py", variant.choices)
    changed = dict(variant.settings)
    if "model.router.capacity_warmup_steps" in changed:
        changed["model.router.capacity_warmup_steps"] = steps // 10
    values = found.config(WIDTH, SETTINGS | changed).to_dict()
    values["model"] |= SHAPES.settings(WIDTH, SHAPES.layers or 8)
    cfg = TrainConfig.from_dict(values)
    return Model(architecture=variant.name, size=WIDTH, cfg=cfg, unit="training", rules=RULES)


def _runs(one: Model, steps: int, equal: float | None, seeds: range) -> list[Planned]:
    """Runs of as many tokens as the plain model's, and of as many FLOPs where that differs."""
    budgets = [steps * _cost(one)]
    if equal is not None and abs(equal / budgets[0] - 1) > 1e-3:
        budgets.append(equal)
    return [planned for seed in seeds for planned in family(one, sorted(budgets), seed)]


def _cost(one: Model) -> float:
    cfg = one.cfg
    return cfg.batch_size * cfg.seq_len * flops_per_token(cfg.model, cfg.seq_len, one.unit)
