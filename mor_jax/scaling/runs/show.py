"""Terminal output of a study: its plan and its progress."""

from collections.abc import Sequence

from rich.table import Table

from mor_jax.observability.number_format import duration
from mor_jax.scaling.runs.collect import Progress
from mor_jax.scaling.study.budgets import UNITS
from mor_jax.scaling.study.manifest import Manifest, Run


def plan_table(manifest: Manifest) -> Table:
    """One row per architecture and size: FLOPs per token, and the steps of each budget."""
    budgets = sorted({run.budget for run in manifest.runs})
    table = Table(title=f"{manifest.study}: runs", title_justify="left", pad_edge=False)
    for name in ("architecture", "size"):
        table.add_column(name)
    for name in ("unique", "effective", "FLOPs/token", "learning rate"):
        table.add_column(name, justify="right")
    for budget in budgets:
        table.add_column(f"steps for {budget:g}", justify="right")
    for group in _groups(manifest.runs).values():
        first = group[0]
        rate = manifest.config(first).optim.lr
        cells = [_steps([run for run in group if run.budget == budget]) for budget in budgets]
        table.add_row(
            first.architecture,
            first.size,
            count(first.unique),
            count(first.effective),
            count(first.flops_per_token),
            f"{rate:g}",
            *cells,
        )
    return table


def plan_lines(manifest: Manifest) -> list[str]:
    """The cost of a study, and the rules behind its numbers."""
    runs = manifest.runs
    own = sum(run.own_steps * run.tokens / run.steps * run.training_flops_per_token for run in runs)
    alone = sum(run.tokens * run.training_flops_per_token for run in runs)
    seeds = sum(run.seed > 0 for run in runs)
    rules = manifest.rules
    found = [
        f"{len(runs)} runs, {seeds} of them additional seeds; FLOPs are {UNITS[manifest.unit]}",
        f"total training FLOPs: {own:.3g}, {1 - own / alone:.0%} less than if each run started "
        "from scratch",
        f"warm-up: {rules['warmup']:g} of the steps of the smallest budget; linear decay: the last "
        f"{rules['decay']:g} of each run",
    ]
    if rules["lr"] is not None:
        rule = f"{rules['lr']:g} * ({rules['lr_width']} / width)^{rules['lr_power']:g}"
        found.append(f"learning rate: {rule}")
    if all(run.device_hours is not None for run in runs):
        hours = sum(run.device_hours or 0.0 for run in runs)
        most = max(runs, key=lambda run: run.device_hours or 0.0)
        found.append(
            f"expected: {hours:.4g} device-hours; the longest run, {most.name}, takes "
            f"{most.device_hours:.3g}"
        )
    return found


def status_table(found: Sequence[Progress], study: str) -> Table:
    """One row per architecture, size and seed; for each budget the loss, or the progress."""
    budgets = sorted({each.run.budget for each in found})
    done = sum(each.state == "done" for each in found)
    title = f"{study}: {done} of {len(found)} runs done"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("architecture", "size", "seed"):
        table.add_column(name)
    for budget in budgets:
        table.add_column(f"{budget:g}", justify="right")
    rows: dict[tuple[str, str, int], dict[float, Progress]] = {}
    for each in found:
        key = (each.run.architecture, each.run.size, each.run.seed)
        rows.setdefault(key, {})[each.run.budget] = each
    for (name, size, seed), cells in rows.items():
        texts = [_cell(cells[budget]) if budget in cells else "" for budget in budgets]
        table.add_row(name, size, str(seed), *texts)
    return table


def flops_left(found: Sequence[Progress]) -> float:
    """Training FLOPs that the runs still need."""
    rest = 0.0
    for each in found:
        if each.state != "done":
            run = each.run
            steps = run.steps - max(each.step, run.source_step)
            rest += steps * run.tokens / run.steps * run.training_flops_per_token
    return rest


def remaining(seconds: float, done: float, rest: float) -> str:
    """`, 12m to go` at the speed of the last `seconds`, in which `done` FLOPs were done."""
    return f", {duration(seconds * rest / done)} to go" if done > 0 else ""


def count(value: float | int) -> str:
    """`612`, `45.2k`, `118M`, `1.71B`."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _cell(each: Progress) -> str:
    if each.state == "done":
        return f"{each.loss:.4f}"
    if each.state == "started":
        return f"{each.step / each.run.steps:.0%}"
    return {"new": "-", "failed": "failed"}[each.state]


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.architecture, run.size), []).append(run)
    return found


def _steps(runs: Sequence[Run]) -> str:
    if not runs:
        return "-"
    seeds = f" x{len(runs)}" if len(runs) > 1 else ""
    return f"{runs[0].steps}{seeds}"


__all__ = ["count", "flops_left", "plan_lines", "plan_table", "remaining", "status_table"]
