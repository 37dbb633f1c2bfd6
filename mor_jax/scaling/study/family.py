"""The runs of one model and seed that are cut from one schedule.

The run of the smallest budget starts from random weights; each later run resumes from the state of
the previous one, taken before its decay. Only decays are computed more than once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mor_jax.checkpoint.run_dir import to_plain
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check, flatten_settings
from mor_jax.models.flops import flops
from mor_jax.models.param_count import effective_parameters, unique_parameters
from mor_jax.scaling.study.budgets import Unit, flops_per_token, steps_for
from mor_jax.scaling.study.manifest import Manifest, Run

Planned = tuple[Run, TrainConfig]
"""A run, still without its settings, and its configuration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How the settings of a run follow from its size and budget.

    lr, lr_width, lr_power: the rate is lr * (lr_width / width) ** lr_power; lr None: that of the
    configuration. warmup: steps, as a fraction of those of the smallest budget. decay: steps, as a
    fraction of the run's. min_steps: a budget that pays for fewer is rejected.
    tokens_per_parameter: where the minimum is expected (20: Hoffmann et al. 2022); the sizes of a
    budget must bracket it.
    """

    lr: float | None = None
    lr_width: int = 128
    lr_power: float = 0.5
    warmup: float = 0.1
    decay: float = 0.2
    min_steps: int = 100
    tokens_per_parameter: float = 20.0

    def __post_init__(self) -> None:
        """Raises `ValueError` on a value out of range."""
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            check(0 <= value < 1, name, value, "must be a fraction in [0, 1)", "Try 0.2")
        for name in ("lr_width", "min_steps", "tokens_per_parameter"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be positive", "Try 20")
        rule = "must be a positive finite number"
        check(self.lr is None or 0 < self.lr < math.inf, "lr", self.lr, rule, "Try 3e-3")
        power = self.lr_power
        check(-8 <= power <= 8, "lr_power", power, "must be in [-8, 8]", "Try 0.5 or 1")

    def rate(self, cfg: TrainConfig) -> float:
        """The learning rate of a model."""
        if self.lr is None:
            return cfg.optim.lr
        return float(f"{self.lr * (self.lr_width / cfg.model.hidden_size) ** self.lr_power:.4g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One architecture at one size, and how its runs are planned.

    cfg: complete except for the run length and what the rules decide. speed: expected FLOP/s.
    """

    architecture: str
    size: str
    cfg: TrainConfig
    unit: Unit
    rules: Rules
    speed: float | None = None


def family(model: Model, budgets: Sequence[float], seed: int) -> list[Planned]:
    """The runs of ascending `budgets` of one model, each resuming from the previous one.

    Raises:
        ValueError: a budget is too small, or the rules make no valid schedule of it.
    """
    name, size, cfg, rules = model.architecture, model.size, model.cfg, model.rules
    batch = cfg.batch_size * cfg.seq_len
    per_token = flops_per_token(cfg.model, cfg.seq_len, model.unit)
    steps = [steps_for(budget, per_token, batch) for budget in budgets]
    for budget, count in zip(budgets, steps, strict=True):
        rule = f"pays for {count} steps of {batch} tokens of {name} at size {size}, fewer than "
        rule += f"min_steps={rules.min_steps}"
        fix = f"Raise the budget, drop the point with --drop={size}@{budget:g}, or use "
        fix += "smaller batches (--config.batch_size)"
        check(count >= rules.min_steps, "budgets", f"{budget:g}", rule, fix)
    warmup = max(round(rules.warmup * steps[0]), 1) if steps else 0
    decays = [round(rules.decay * count) for count in steps]
    planned: list[Planned] = []
    for budget, count, decay in zip(budgets, steps, decays, strict=True):
        run_cfg = _with_end(cfg, rules, count, warmup, decay, seed)
        source = planned[-1][0] if planned else None
        start = source.steps - decays[len(planned) - 1] if source else 0
        training = flops(cfg.model, cfg.seq_len).training()
        own = (count - start) * batch * training
        run = Run(
            name=f"{name}-{size}-{_short(budget)}-s{seed}",
            architecture=name,
            size=size,
            budget=float(budget),
            seed=seed,
            steps=count,
            tokens=count * batch,
            flops=count * batch * per_token,
            flops_per_token=per_token,
            training_flops_per_token=training,
            unique=unique_parameters(cfg.model, embedding=False),
            effective=effective_parameters(cfg.model, embedding=False),
            source=source.name if source else None,
            source_step=start,
            device_hours=None if model.speed is None else own / model.speed / 3600,
            settings={},
        )
        planned.append((run, run_cfg))
    return planned


def _with_end(
    cfg: TrainConfig, rules: Rules, steps: int, warmup: int, decay: int, seed: int
) -> TrainConfig:
    """A run of `steps` that saves the state before its decay and is evaluated at its end."""
    run_cfg = dataclasses.replace(
        cfg,
        steps=steps,
        seed=cfg.seed + seed,
        optim=dataclasses.replace(
            cfg.optim,
            lr=rules.rate(cfg),
            schedule="trapezoid",
            warmup_steps=warmup,
            decay_steps=decay,
        ),
        checkpoint=dataclasses.replace(cfg.checkpoint, max_to_keep=1, keep_steps=(steps - decay,)),
    )
    run_cfg.validate()
    return run_cfg


def assemble(
    study: str, unit: Unit, rules: dict[str, Any], code: dict[str, Any], planned: Sequence[Planned]
) -> Manifest:
    """A manifest of runs; what they have in common is taken from the first.

    Raises:
        ValueError: two runs have one name.
    """
    names = [run.name for run, _ in planned]
    again = sorted({name for name in names if names.count(name) > 1})
    fix = "Choose budgets that differ by at least 1%"
    check(not again, "runs", again, "are planned twice", fix)
    base = to_plain(planned[0][1])
    runs = [dataclasses.replace(run, settings=_settings(base, cfg)) for run, cfg in planned]
    return Manifest(study=study, unit=unit, rules=rules, code=code, base=base, runs=tuple(runs))


def _settings(base: dict[str, Any], cfg: TrainConfig) -> dict[str, Any]:
    before, after = flatten_settings(base), flatten_settings(to_plain(cfg))
    return {key: value for key, value in after.items() if before.get(key, ...) != value}


def _short(budget: float) -> str:
    return f"{budget:.3g}".replace("e+", "e")


__all__ = ["Model", "Planned", "Rules", "assemble", "family"]
