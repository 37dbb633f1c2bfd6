"""Checks that the sizes of a budget bracket the expected minimum of the loss."""

from collections.abc import Sequence

from mor_jax.config.parsing import check
from mor_jax.scaling.study.manifest import Run

_MIN_SIZES = 3


def check_brackets(runs: Sequence[Run], ratio: float) -> None:
    """Rejects grids that cannot give a parabola with an interior minimum.

    ratio: tokens per effective parameter around which the minimum is expected.

    Raises:
        ValueError: a group of one architecture and budget has fewer than three sizes, or all of
            them on one side of the ratio.
    """
    groups: dict[tuple[str, float], dict[str, Run]] = {}
    for run in runs:
        groups.setdefault((run.architecture, run.budget), {})[run.size] = run
    for (name, budget), sizes in groups.items():
        rule = f"{name} has {len(sizes)} sizes at {budget:g} FLOPs; to bracket a minimum it needs "
        rule += f"{_MIN_SIZES}"
        check(len(sizes) >= _MIN_SIZES, "sizes", sorted(sizes), rule, "Add sizes")
        _check_sides(name, budget, list(sizes.values()), ratio)


def _check_sides(name: str, budget: float, runs: list[Run], ratio: float) -> None:
    ratios = {run.size: run.tokens / run.effective for run in runs}
    listed = ", ".join(f"{size}: {value:.3g}" for size, value in ratios.items())
    rule = f"{name} at {budget:g} FLOPs trains on these tokens per effective parameter: {listed}; "
    small, large = max(ratios.values()), min(ratios.values())
    rule += f"the minimum is expected near {ratio:g}, which they do not bracket"
    # Tokens fall with the size, so their ratio falls with its square.
    side = "smaller" if small <= ratio else "larger"
    nearest = min(runs, key=lambda run: run.effective * (1 if side == "smaller" else -1))
    target = nearest.effective * (ratios[nearest.size] / ratio) ** 0.5
    fix = f"Add {side} sizes (about {target:.2g} effective parameters), change the budget, or "
    fix += "set --tokens_per_parameter to where you expect the minimum"
    check(large < ratio < small, "sizes", sorted(ratios), rule, fix)
