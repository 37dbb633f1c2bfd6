"""Plans as tables: ruled ones in a terminal, aligned lines elsewhere."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor_jax.observability.progress import quantity
from mor_jax.planning.report import Plan, TooLarge

Row = tuple[str, ...]


def show(plan: Plan | TooLarge, console: Console) -> None:
    """Prints one answer."""
    if isinstance(plan, TooLarge):
        _too_large(plan, console)
        return
    _line(console, _title(plan), "bold")
    _line(console, _settings(plan))
    console.print()
    _table(console, ("memory of a chip", "bytes", ""), _memory_rows(plan))
    if plan.memory.largest:
        rows = [(_cut(what), size(count)) for count, what in plan.memory.largest]
        _table(console, ("largest temporaries", "bytes"), rows)
    _table(
        console,
        ("received by a chip in a step", "what", "times", "inside a slice", "between slices"),
        _exchange_rows(plan),
    )
    if plan.gathered:
        head = ("parameters gathered", "forward", "backward")
        rows = [(g.what, f"{g.forward:.2f}", f"{g.backward:.2f}") for g in plan.gathered]
        _table(console, head, rows)
    _table(console, ("of a chip and a step", "amount", "peak", "time"), _time_rows(plan))
    _table(console, ("ceiling, if all of it overlaps", "", ""), _ceiling_rows(plan))
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
        ("parameters", size(m.parameters), "float32, by shapes"),
        ("optimiser state", size(m.optimizer), "by shapes"),
        ("arguments", size(m.arguments), "both and the batch, as the program holds them"),
    ]
    if m.temporaries is None:
        rows.append(("temporaries", "unknown", f"{size(m.estimate)} by our accounting"))
    else:
        rows.append(("temporaries", size(m.temporaries), "beside them during the step"))
        rows.append(("program", size(m.program), ""))
    if m.host:
        rows.append(("host memory", size(m.host), "for one chip"))
    word = "fits" if m.fits else "does not fit"
    if m.temporaries is None:
        word = f"{word} by our accounting"
    share = f"{m.total / m.available:.0%} of {size(m.available)}: {word}"
    rows.append(("together", size(m.total), share))
    return rows


def _exchange_rows(plan: Plan) -> list[Row]:
    rows = [
        (row.kind, row.what, str(row.count), size(row.inside), size(row.between))
        for row in plan.exchanges
    ]
    count = sum(row.count for row in plan.exchanges)
    return [*rows, ("together", "", str(count), size(plan.inside), size(plan.between))]


def _time_rows(plan: Plan) -> list[Row]:
    times = plan.times
    amounts = {
        "matrix": ("matrix units", f"{quantity(plan.hardware_flops)}FLOP"),
        "memory": ("main memory", size(plan.memory_traffic or 0)),
        "inside": ("network inside a slice", size(plan.inside)),
        "between": ("network between slices", size(plan.between)),
    }
    done = {
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
            rows.append((label, amount if done[name] else "unknown", "unknown", ""))
            continue
        unit = "FLOP/s" if name == "matrix" else "B/s"
        peak = f"{quantity(done[name] / seconds)}{unit}" if seconds else ""
        mark = "  binds" if name == times.binds else ""
        rows.append((label, amount, peak, f"{_short(seconds * 1e3)} ms{mark}"))
    return rows


def _ceiling_rows(plan: Plan) -> list[Row]:
    words = {
        "matrix": "matrix units bind",
        "memory": "main memory binds",
        "inside": "the network inside a slice binds",
        "between": "the network between slices binds",
    }
    return [
        ("step", f"{_short(plan.times.step * 1e3)} ms", words[plan.times.binds]),
        ("MFU", f"{plan.mfu:.1%}", f"{quantity(plan.model_flops)}FLOP of the model a chip"),
        ("tokens/s", quantity(plan.tokens_per_second), f"{plan.tokens} tokens a step"),
        ("days", _short(plan.days), f"for {quantity(plan.budget)} tokens"),
    ]


def compare(plans: Sequence[Plan | TooLarge], console: Console) -> None:
    """Prints several variants side by side, with ratios to the first."""
    for plan in plans:
        _line(console, f"{_title(plan)}: {_settings(plan)}")
    console.print()
    fitting = [plan for plan in plans if isinstance(plan, Plan)]
    if fitting:
        _table(console, ("", *(p.variant for p in fitting)), _compared(fitting))
    for plan in plans:
        if isinstance(plan, TooLarge):
            _too_large(plan, console)


def _compared(plans: Sequence[Plan]) -> list[Row]:
    measures: list[tuple[str, Callable[[Plan], float | int | None], Callable[[float], str]]] = [
        ("parameters stored", lambda p: p.parameters, quantity),
        ("arguments", lambda p: p.memory.arguments, size),
        ("temporaries", lambda p: p.memory.temporaries, size),
        ("memory together", lambda p: p.memory.total, size),
        ("network inside a slice", lambda p: p.inside, size),
        ("network between slices", lambda p: p.between, size),
        ("network together", lambda p: p.inside + p.between, size),
        ("main memory traffic", lambda p: p.memory_traffic, size),
        ("model FLOPs", lambda p: p.model_flops, quantity),
        ("executed FLOPs", lambda p: p.hardware_flops, quantity),
        ("matrix units, ms", lambda p: p.times.matrix * 1e3, _short),
        ("step ceiling, ms", lambda p: p.times.step * 1e3, _short),
        ("tokens/s ceiling", lambda p: p.tokens_per_second, quantity),
        ("days", lambda p: p.days, _short),
    ]
    rows: list[Row] = []
    for name, measure, write in measures:
        values = [measure(plan) for plan in plans]
        if not any(values):
            continue
        first = values[0]
        cells = []
        for i, value in enumerate(values):
            ratio = f" ({value / first:.2f})" if i and value and first else ""
            cells.append("unknown" if value is None else write(value) + ratio)
        rows.append((name, *cells))
    rows.append(("binds", *(plan.times.binds for plan in plans)))
    rows.append(("MFU ceiling", *(f"{plan.mfu:.1%}" for plan in plans)))
    return rows


def _too_large(plan: TooLarge, console: Console) -> None:
    _line(console, f"{_title(plan)} does not fit", "bold red")
    _line(console, _settings(plan))
    short = plan.needed - plan.available
    text = f"needs {size(plan.needed)} of a chip's memory and may use {size(plan.available)}:"
    _line(console, f"{text} {size(short)} too much\n")
    rows = [(name, size(count)) for name, count in plan.parts if count]
    _table(console, ("what takes it", "bytes"), rows)
    if plan.largest:
        rows = [(what, size(count)) for count, what in plan.largest[:8]]
        _table(console, ("the compiler's largest", "bytes"), rows)
    if plan.attempts:
        rows = [(_change(a.settings), _outcome(a.short, a.total)) for a in plan.attempts]
        _table(console, ("tried instead", "outcome"), rows)
    if plan.attempts and plan.attempts[-1].short is None:
        flags = " ".join(f"--config.{k}={v}" for k, v in plan.attempts[-1].settings.items())
        _line(console, f"fits with {flags}")
    elif plan.out_of_time:
        _line(console, "nothing that fits in the time given; --try_seconds gives more")
    elif plan.attempts:
        _line(console, "nothing that was tried fits: more chips, or chips with more memory")


def _cut(text: str, most: int = 70) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _change(settings: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _outcome(short: int | None, total: int | None) -> str:
    return f"{size(short)} too much" if short is not None else f"fits, {size(total or 0)}"


def size(count: float | int) -> str:
    """Bytes with a decimal unit: 2.87 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f} B"


def _short(value: float | int) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "unknown")


def _table(console: Console, head: Row, rows: Sequence[Row]) -> None:
    right = [i > 0 and all(_number(row[i]) for row in rows) for i in range(len(head))]
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
