"""Groups of runs whose loss is a function that the test chooses."""

from collections.abc import Callable, Sequence

from mor_jax.scaling.fit.parabola import Cell, Group


def loss_group(
    sizes: Sequence[float],
    loss: Callable[[float, float], float],
    budget: float = 1e18,
    name: str = "plain",
    runs: int = 1,
    spread: float | None = None,
) -> Group:
    """Cells of these parameters, 6 N FLOPs a token each. loss: of parameters and tokens."""
    cells = []
    for i, size in enumerate(sizes):
        tokens = budget / (6 * size)
        cells.append(
            Cell(
                size=f"s{i}",
                parameters=float(size),
                runs=runs,
                loss=loss(size, tokens),
                spread=spread,
                tokens=tokens,
                flops=budget,
                flops_per_token=6 * size,
            )
        )
    return Group(architecture=name, budget=budget, cells=tuple(cells))
