"""Tables of what was compiled."""

from typing import Any

from mor_jax.planning.tables import format_bytes

Record = dict[str, Any]

HEAD = (
    *("model", "program", "devices", "capacities", "arguments", "temporaries", "peak"),
    *("attention kernels", "compile s"),
)
HEAD_MULTIPLES = (
    *(
        "model, program, device",
        "multiple",
        "capacities",
        "peak",
        "temporaries",
        "bytes accessed",
        "TFLOP",
    ),
    "compile s",
)


def table(records: list[Record]) -> str:
    """All programs, in the order given."""
    return markdown(HEAD, [_row(record) for record in records])


def _row(record: Record) -> list[str]:
    name = f"{record['size']} {record['model']}"
    cells = [name, record["program"], f"{record['devices']} {record['target']}"]
    if "error" in record:
        return [*cells, "", "", "", "", f"**{record['error']}**", ""]
    trained = record["program"] in ("train", "topk") and len(set(record["capacities"])) > 1
    return [
        *cells,
        " ".join(map(str, record["capacities"])) if trained else "",
        *(format_bytes(record[key]) for key in ("arguments", "temporaries", "peak")),
        kernels(record["kernels"]),
        f"{record['compile_seconds']:.0f}",
    ]


def kernels(found: dict[str, int]) -> str:
    """`Softmax x 5, SoftmaxBackward x 3`: cuDNN's calls, as often as the program holds them."""
    names = {name.removeprefix("__cudnn$fmha"): count for name, count in sorted(found.items())}
    return ", ".join(f"{name} x {count}" for name, count in names.items()) or "none"


def multiples(records: list[Record]) -> str:
    """The same step with capacities rounded differently."""
    rows = []
    for record in records:
        first = next(r for r in records if _program(r) == _program(record))
        where = ", ".join(_program(record))
        cells = [where, str(record["multiple"])]
        if "error" in record:
            rows.append([*cells, record["error"], "", "", "", "", ""])
            continue
        rows.append(
            [
                *cells,
                " ".join(map(str, record["capacities"])),
                *(_beside(record, first, key) for key in ("peak", "temporaries", "accessed")),
                f"{record['flops'] / 1e12:.2f} ({record['flops'] / first['flops']:.3f})",
                f"{record['compile_seconds']:.0f}",
            ]
        )
    return markdown(HEAD_MULTIPLES, rows)


def _program(record: Record) -> tuple[str, ...]:
    return f"{record['size']} {record['model']}", record["program"], record["target"]


def _beside(record: Record, first: Record, key: str) -> str:
    return f"{format_bytes(record[key])} ({record[key] / first[key]:.3f})"


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
