"""Prints plans as tables: ruled tables in a terminal, aligned columns elsewhere."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor_jax.observability.number_format import quantity
from mor_jax.planning.report import Plan, TooLarge

Row = tuple[str, ...]


def print_plan(plan: Plan | TooLarge, console: Console) -> None:
    """Prints one plan, or why the step does not fit."""
    if isinstance(plan, TooLarge):
        _print_too_large(plan, console)
        return
    _line(console, _title(plan), "bold")
    _line(console, _settings(plan))
    console.print()
    _table(console, ("memory per chip", "bytes", ""), _memory_rows(plan))
    if plan.memory.largest:
        rows = [(_shorten(what), format_bytes(count)) for count, what in plan.memory.largest]
        _table(console, ("largest temporaries", "bytes"), rows)
    _table(
        console,
        ("received per chip and step", "what", "count", "inside a slice", "between slices"),
        _exchange_rows(plan),
    )
    if plan.gathered:
        head = ("parameters gathered", "forward", "backward")
        rows = [(g.what, f"{g.forward:.2f}", f"{g.backward:.2f}") for g in plan.gathered]
        _table(console, head, rows)
    _table(console, ("per chip and step", "amount", "peak", "time"), _time_rows(plan))
    _table(console, ("ceiling, with full overlap", "", ""), _ceiling_rows(plan))
    for note in plan.notes:
        _line(console, f"note: {note}")


def _title(plan: Plan | TooLarge) -> str:
    used = {name: size for name, size in plan.mesh.items() if size > 1}
    axes = " ".join(f"{name}={size}" for name, size in used.items()) or "one device"
    chips = f"{plan.chips} chips" if plan.chips > 1 else "1 chip"
    return f"{plan.variant} on {plan.topology} ({chips}, {axes})"


def _settings(plan: Plan | TooLarge) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in plan.settings.items() if value is not None
    )


def _memory_rows(plan: Plan) -> list[Row]:
    m = plan.memory
    rows = [
        ("parameters", format_bytes(m.parameters), "float32, from shapes"),
        ("optimiser state", format_bytes(m.optimizer), "from shapes"),
        (
            "arguments",
            format_bytes(m.arguments),
            "both and the batch, as the compiled step stores them",
        ),
    ]
    if m.temporaries is None:
        rows.append(("temporaries", "unknown", f"{format_bytes(m.estimate)}, estimated"))
    else:
        rows.append(("temporaries", format_bytes(m.temporaries), "in addition, during the step"))
        rows.append(("program", format_bytes(m.program), ""))
    if m.host:
        rows.append(("host memory", format_bytes(m.host), "per chip"))
    verdict = "fits" if m.fits else "does not fit"
    if m.temporaries is None:
        verdict = f"{verdict}, as estimated"
    share = f"{m.total / m.available:.0%} of {format_bytes(m.available)}: {verdict}"
    rows.append(("total", format_bytes(m.total), share))
    return rows


def _exchange_rows(plan: Plan) -> list[Row]:
    rows = [
        (row.kind, row.what, str(row.count), format_bytes(row.inside), format_bytes(row.between))
        for row in plan.exchanges
    ]
    count = sum(row.count for row in plan.exchanges)
    return [*rows, ("total", "", str(count), format_bytes(plan.inside), format_bytes(plan.between))]


def _time_rows(plan: Plan) -> list[Row]:
    times = plan.times
    amounts = {
        "matrix": ("matrix units", f"{quantity(plan.hardware_flops)}FLOP"),
        "memory": ("main memory", format_bytes(plan.memory_traffic or 0)),
        "inside": ("network inside a slice", format_bytes(plan.inside)),
        "between": ("network between slices", format_bytes(plan.between)),
    }
    totals = {
        "matrix": plan.hardware_flops,
        "memory": plan.memory_traffic or 0,
        "inside": plan.inside,
        "between": plan.between,
    }
    rows = []
    for name, (label, amount) in amounts.items():
        seconds = times.known.get(name)
        if name == "between" and plan.slices == 1:
            continue
        if seconds is None:
            rows.append((label, amount if totals[name] else "unknown", "unknown", ""))
            continue
        unit = "FLOP/s" if name == "matrix" else "B/s"
        peak = f"{quantity(totals[name] / seconds)}{unit}" if seconds else ""
        mark = "  bottleneck" if name == times.binds else ""
        rows.append((label, amount, peak, f"{_short(seconds * 1e3)} ms{mark}"))
    return rows


def _ceiling_rows(plan: Plan) -> list[Row]:
    words = {
        "matrix": "bound by the matrix units",
        "memory": "bound by main memory",
        "inside": "bound by the network inside a slice",
        "between": "bound by the network between slices",
    }
    return [
        ("step", f"{_short(plan.times.step * 1e3)} ms", words[plan.times.binds]),
        ("MFU", f"{plan.mfu:.1%}", f"{quantity(plan.model_flops)}FLOP of the model per chip"),
        ("tokens/s", quantity(plan.tokens_per_second), f"{plan.tokens} tokens per step"),
        ("days", _short(plan.days), f"for {quantity(plan.budget)} tokens"),
    ]


def print_comparison(plans: Sequence[Plan | TooLarge], console: Console) -> None:
    """Prints several variants in columns, with ratios to the first one."""
    for plan in plans:
        _line(console, f"{_title(plan)}: {_settings(plan)}")
    console.print()
    fitting = [plan for plan in plans if isinstance(plan, Plan)]
    if fitting:
        _table(console, ("", *(p.variant for p in fitting)), _comparison_rows(fitting))
    for plan in plans:
        if isinstance(plan, TooLarge):
            _print_too_large(plan, console)


def _comparison_rows(plans: Sequence[Plan]) -> list[Row]:
    measures: list[tuple[str, Callable[[Plan], float | int | None], Callable[[float], str]]] = [
        ("parameters stored", lambda p: p.parameters, quantity),
        ("arguments", lambda p: p.memory.arguments, format_bytes),
        ("temporaries", lambda p: p.memory.temporaries, format_bytes),
        ("memory in total", lambda p: p.memory.total, format_bytes),
        ("network inside a slice", lambda p: p.inside, format_bytes),
        ("network between slices", lambda p: p.between, format_bytes),
        ("network in total", lambda p: p.inside + p.between, format_bytes),
        ("main memory traffic", lambda p: p.memory_traffic, format_bytes),
        ("model FLOPs", lambda p: p.model_flops, quantity),
        ("executed FLOPs", lambda p: p.hardware_flops, quantity),
        ("matrix units, ms", lambda p: p.times.matrix * 1e3, _short),
        ("step ceiling, ms", lambda p: p.times.step * 1e3, _short),
        ("tokens/s ceiling", lambda p: p.tokens_per_second, quantity),
        ("days", lambda p: p.days, _short),
    ]
    rows: list[Row] = []
    for name, measure, render in measures:
        values = [measure(plan) for plan in plans]
        if not any(values):
            continue
        first = values[0]
        cells = []
        for i, value in enumerate(values):
            ratio = f" ({value / first:.2f})" if i and value and first else ""
            cells.append("unknown" if value is None else render(value) + ratio)
        rows.append((name, *cells))
    rows.append(("bottleneck", *(plan.times.binds for plan in plans)))
    rows.append(("MFU ceiling", *(f"{plan.mfu:.1%}" for plan in plans)))
    return rows


def _print_too_large(plan: TooLarge, console: Console) -> None:
    _line(console, f"{_title(plan)} does not fit", "bold red")
    _line(console, _settings(plan))
    short = plan.needed - plan.available
    needed, available = format_bytes(plan.needed), format_bytes(plan.available)
    text = f"needs {needed} per chip, of which {available} are available"
    _line(console, f"{text}: {format_bytes(short)} too much\n")
    rows = [(name, format_bytes(count)) for name, count in plan.parts if count]
    _table(console, ("memory by use", "bytes"), rows)
    if plan.largest:
        rows = [(what, format_bytes(count)) for count, what in plan.largest[:8]]
        _table(console, ("largest allocations", "bytes"), rows)
    if plan.attempts:
        rows = [(_format_settings(a.settings), _outcome(a.short, a.total)) for a in plan.attempts]
        _table(console, ("tried instead", "outcome"), rows)
    if plan.attempts and plan.attempts[-1].short is None:
        flags = " ".join(f"--config.{k}={v}" for k, v in plan.attempts[-1].settings.items())
        _line(console, f"fits with {flags}")
    elif plan.out_of_time:
        _line(
            console,
            "no fitting settings found within the time limit; raise --try_seconds to try more",
        )
    elif plan.attempts:
        _line(console, "none of these settings fit: use more chips, or chips with more memory")


def _shorten(text: str, limit: int = 70) -> str:
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _format_settings(settings: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _outcome(short: int | None, total: int | None) -> str:
    return (
        f"{format_bytes(short)} too much"
        if short is not None
        else f"fits, {format_bytes(total or 0)}"
    )


def format_bytes(count: float | int) -> str:
    """Bytes with a decimal unit: 2.87 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f} B"


def _short(value: float | int) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "unknown")


def _table(console: Console, head: Row, rows: Sequence[Row]) -> None:
    right = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for title, number in zip(head, right, strict=True):
            table.add_column(title, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = zip(row, widths, right, strict=True)
        line = "  ".join(c.rjust(w) if number else c.ljust(w) for c, w, number in cells)
        _line(console, line.rstrip())
    console.print()
