"""Studies whose loss law is known: L = E + A / N^alpha + B / D^beta plus noise."""

import dataclasses
import math

import numpy as np

from mor_jax.scaling.runs.points import Point


@dataclasses.dataclass(frozen=True)
class Law:
    """flops: training FLOPs per token and unique parameter. sharing: effective over unique."""

    E: float = 1.8
    A: float = 480.0
    alpha: float = 0.34
    B: float = 2000.0
    beta: float = 0.37
    flops: float = 6.0
    sharing: int = 1

    @property
    def a(self) -> float:
        """Exponent of the best size over compute."""
        return self.beta / (self.alpha + self.beta)

    def best(self, budget: float) -> float:
        """Unique parameters of the lowest loss."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        power = (budget / self.flops) ** self.beta
        return (ratio * power) ** (1 / (self.alpha + self.beta))

    def loss(self, size: float, tokens: float) -> float:
        """Without noise."""
        return self.E + self.A / size**self.alpha + self.B / tokens**self.beta


def study(
    laws: dict[str, Law],
    budgets=(1e17, 3e17, 1e18),
    sizes: int = 4,
    noise: float = 0.01,
    seed: int = 0,
    **more,
) -> list[Point]:
    """Points of all architectures. more: `seeds` of a size; `shift`, in steps of 1.7 from the best
    size; `leak`, which top-k routing takes off the loss of what is routed."""
    rng = np.random.default_rng(seed)
    points = []
    for name, law in laws.items():
        for budget in budgets:
            for i in range(sizes):
                size = law.best(budget) * 1.7 ** (i - (sizes - 1) / 2 + more.get("shift", 0.0))
                tokens = budget / (law.flops * size)
                for repeat in range(more.get("seeds", 1)):
                    loss = law.loss(size, tokens) + noise * rng.standard_normal()
                    routed = "leak" in more and name != "plain"
                    points.append(
                        Point(
                            run=f"{name}-{budget:.0e}-{i}-{repeat}",
                            architecture=name,
                            size=f"s{i}",
                            budget=budget,
                            seed=repeat,
                            unique=round(size),
                            effective=round(size) * law.sharing,
                            tokens=round(tokens),
                            flops=budget,
                            flops_per_token=law.flops * size,
                            loss_causal=loss,
                            loss_topk=loss - more["leak"] if routed else None,
                        )
                    )
    return points


def inside(value: float, ends) -> bool:
    """Whether an interval holds a value."""
    return ends[0] <= value <= ends[1] and math.isfinite(value)
