"""A fit as tables: ruled in a terminal, aligned text elsewhere, cells for the report page.

Intervals are written in brackets after their value, `0.52 [0.49, 0.55]`.
"""

import dataclasses
import io

from rich import box
from rich.console import Console
from rich.table import Table as Ruled
from rich.text import Text

from mor_jax.observability.number_format import quantity
from mor_jax.scaling.fit.fit import Fit, View
from mor_jax.scaling.fit.minima import Best
from mor_jax.scaling.fit.power_law import Interval

Row = tuple[str, ...]

VERDICTS = {
    "more size": "spends more of additional compute on size",
    "more length": "spends more of additional compute on length",
    "undecided": "no difference beyond the noise",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """title: what the rows are, as a phrase. note: how to read them, may be empty."""

    title: str
    head: Row
    rows: tuple[Row, ...]
    note: str = ""


def tables(fit: Fit, view: View) -> list[Table]:
    """The tables that have rows, in reading order."""
    candidates = [
        _equal(fit, view),
        _minima(fit, view),
        _laws(fit, view),
        _differences(fit, view),
        _parametric(fit, view),
    ]
    return [table for table in candidates if table.rows]


def about(view: View) -> str:
    """The parameters and the routing of the view."""
    kinds = {"unique": "unique (stored)", "effective": "effective (as if nothing were shared)"}
    routings = {"causal": "causal routing", "topk": "top-k routing, as in training"}
    return f"{kinds[view.kind]} parameters, loss under {routings[view.routing]}"


def noise_line(view: View) -> str:
    """The noise of one run's loss, and its source."""
    noise = view.noise
    if noise.deviation is None:
        return "noise of a run: unknown"
    text = f"noise of a run: {noise.deviation:.4f} nats per token, from {noise.freedom} residuals"
    if noise.between_seeds is not None:
        text += f"; between seeds {noise.between_seeds:.4f} ({noise.seeds_freedom} repeated runs)"
    return text


def refusals(view: View) -> list[str]:
    """One line per fit that was not made."""
    return [refusal.line() for refusal in view.refused]


def show(fit: Fit, console: Console, routing: str = "causal", kind: str = "unique") -> None:
    """Prints one view of `fit`."""
    view = fit.view(routing, kind)
    _line(console, f"{about(view)}; {fit.options.confidence:.0%} intervals", "bold")
    _line(console, noise_line(view))
    console.print()
    for table in tables(fit, view):
        _line(console, table.title, "bold")
        _print(console, table)
    for text in refusals(view):
        _line(console, f"refused: {text}", "yellow")
    for note in fit.notes:
        _line(console, f"note: {note}")


def lines(fit: Fit, routing: str = "causal", kind: str = "unique") -> list[str]:
    """What `show` prints outside a terminal."""
    text = io.StringIO()
    show(fit, Console(file=text, force_terminal=False, width=400), routing, kind)
    return text.getvalue().splitlines()


def compute(flops: float | int) -> str:
    """FLOPs with three digits: 3.16e+15 as 3.16e15."""
    return f"{flops:.3g}".replace("e+", "e")


def ends(pair: Interval | None, write: str = ".3f") -> str:
    """` [0.49, 0.55]`, or nothing."""
    return "" if pair is None else f" [{pair[0]:{write}}, {pair[1]:{write}}]"


def _counts(value: float, pair: Interval | None) -> str:
    return quantity(value) + (
        "" if pair is None else f" [{quantity(pair[0])}, {quantity(pair[1])}]"
    )


def _measured(best: Best) -> str:
    spread = "" if best.spread is None else f" ± {best.spread:.4f} ({best.runs} seeds)"
    return f"{best.loss:.4f}{spread}"


def _equal(fit: Fit, view: View) -> Table:
    gaps = {(gap.architecture, gap.budget): gap for gap in view.gaps}
    minima = {(m.architecture, m.budget): m for m in view.minima}
    rows = []
    for best in sorted(view.best, key=lambda row: row.budget):
        key = (best.architecture, best.budget)
        gap, minimum = gaps.get(key), minima.get(key)
        apart = measured = ""
        if gap is not None:
            measured = f"{gap.of_runs:+.4f}{ends(gap.runs_interval, '+.4f')}"
            apart = "refused"
            if gap.at_minima is not None:
                apart = f"{gap.at_minima:+.4f}{ends(gap.minima_interval, '+.4f')}"
        lowest = "refused" if minimum is None else f"{minimum.loss:.4f}"
        text = f"{_measured(best)} at {best.size}"
        rows.append((compute(best.budget), best.architecture, text, measured, lowest, apart))
    base = fit.baseline
    gap = f"its gap to {base}"
    head = ("FLOPs", "architecture", "lowest run", gap, "loss at the minimum", gap)
    note = f"Nats per token; below 0 is better than {base} at equal FLOPs."
    return Table("loss at equal FLOPs", head, tuple(rows), note)


def _minima(fit: Fit, view: View) -> Table:
    rows = [
        (
            m.architecture,
            compute(m.budget),
            f"{m.runs} of {m.sizes}",
            _counts(m.parameters, m.parameters_interval),
            _counts(m.tokens, m.tokens_interval),
            f"{m.tokens / m.parameters:.3g}",
            f"{m.loss:.4f}{ends(m.loss_interval, '.4f')}",
            m.warning or "",
        )
        for m in view.minima
    ]
    head = ("architecture", "FLOPs", "runs of sizes", "best N", "best D", "D / N", "loss")
    note = "Minimum of the parabola of loss in ln N at each budget."
    return Table("minima", (*head, "warning"), tuple(rows), note)


def _laws(fit: Fit, view: View) -> Table:
    rows = [
        (
            law.architecture,
            str(law.budgets),
            f"{law.a:.3f}{ends(law.a_interval)}",
            f"{law.b:.3f}{ends(law.b_interval)}",
            compute(law.at),
            _counts(law.parameters_at, law.parameters_interval),
            _counts(law.tokens_at, law.tokens_interval),
            "" if law.scatter is None else f"{law.scatter:.1%}",
        )
        for law in view.laws
    ]
    head = ("architecture", "budgets", "a", "b", "at FLOPs", "best N there", "best D there")
    note = "Best N grows as C^a, best D as C^b; scatter: of the minima around the law."
    return Table("power laws of compute", (*head, "scatter of N"), tuple(rows), note)


def _differences(fit: Fit, view: View) -> Table:
    rows = [
        (
            f"{d.architecture} minus {d.against}",
            f"{d.difference:+.3f}{ends(d.interval, '+.3f')}",
            f"{d.architecture}: {VERDICTS[d.verdict]}" if d.interval else "no interval",
        )
        for d in view.differences
    ]
    note = "Above 0, the first architecture spends more of additional compute on size."
    return Table(
        "comparison of slopes", ("exponents a", "difference", "reading"), tuple(rows), note
    )


def _parametric(fit: Fit, view: View) -> Table:
    rows = [
        (
            law.architecture,
            str(law.runs),
            f"{law.E:.3f}{ends(law.intervals.get('E'))}",
            f"{law.A:.4g}",
            f"{law.B:.4g}",
            f"{law.alpha:.3f}{ends(law.intervals.get('alpha'))}",
            f"{law.beta:.3f}{ends(law.intervals.get('beta'))}",
            f"{law.a:.3f}{ends(law.intervals.get('a'))}",
            _counts(law.parameters_at, law.intervals.get("parameters_at")),
            "unreliable: " + "; ".join(law.doubts) if law.doubts else "",
        )
        for law in view.parametric
    ]
    at = compute(view.parametric[0].at) if view.parametric else ""
    head = ("architecture", "sizes x budgets", "E", "A", "B", "alpha", "beta", "a")
    title = "second opinion: L = E + A / N^alpha + B / D^beta"
    return Table(title, (*head, f"best N at {at}", "warning"), tuple(rows))


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _print(console: Console, table: Table) -> None:
    # Columns that are empty in every row are dropped.
    columns = [i for i in range(len(table.head)) if any(row[i] for row in table.rows)]
    rows = [tuple(row[i] for i in columns) for row in (table.head, *table.rows)]
    if console.is_terminal:
        ruled = Ruled(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for title in rows[0]:
            ruled.add_column(title, overflow="fold")
        for row in rows[1:]:
            ruled.add_row(*(Text(cell) for cell in row))
        console.print(ruled)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        _line(console, "  ".join(cell.ljust(width) for cell, width in cells).rstrip())
    console.print()


__all__ = [
    "VERDICTS",
    "Table",
    "about",
    "compute",
    "ends",
    "lines",
    "noise_line",
    "refusals",
    "show",
    "tables",
]
