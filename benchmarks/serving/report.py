"""The tables of the serving benchmark, from its records."""

from typing import Any

Record = dict[str, Any]

_HEAD = """# Serving

Made by `benchmarks/serve_throughput.py --save`, which explains it.
"""


def page(records: list[Record]) -> str:
    """Markdown: the newest record of each kind, by machine and shape."""
    newest: dict[tuple, Record] = {}
    for record in records:
        newest[_key(record)] = record
    groups: dict[tuple, list[Record]] = {}
    for record in newest.values():
        groups.setdefault(_key(record)[:4], []).append(record)
    return "\n".join([_HEAD, *(_group(list(group)) for group in groups.values())])


def _key(record: Record) -> tuple:
    same = ("device", "cores", "shape", "dtype", "part", "model", "budget")
    return tuple(record.get(name) for name in same)


def _group(records: list[Record]) -> str:
    first = records[0]
    rates = dict(first["rates"])
    dates = sorted({record["date"] for record in records})
    made = [
        f"## {first['shape']}, {first['dtype']}\n",
        f"{first['device']}, {first['cores']} cores, {dates[-1]}, JAX {first['jax']}. "
        f"Products with 32 rows {rates[32] / 1e9:,.0f} GFLOP/s, with 512 "
        f"{rates[512] / 1e9:,.0f}; memory {first['bandwidth'] / 1e9:,.0f} GB/s, the engine's "
        f"attention {first['decoding'] / 1e9:,.0f} GB/s in decoding, {first['prefill'] / 1e9:,.0f} "
        "GFLOP/s for prompts.\n",
    ]
    fixed = [record for record in records if record["part"] == "fixed"]
    if fixed:
        made.append(f"### {fixed[0]['slots']} sequences at a time\n\n{_speeds(fixed)}")
    budgets = sorted({record["budget"] for record in records if record["part"] == "budget"})
    for budget in budgets:
        rows = [record for record in records if record.get("budget") == budget]
        size = max(record["cache_bytes"] for record in rows) / 2**20
        title = f"### {size:,.0f} MiB of cache: what {budget} plain sequences of 512 tokens take"
        made.append(f"{title}\n\n{_speeds(rows)}")
    made += [part for part in (_gains(records), _rival(records)) if part]
    return "\n".join(made)


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [" | ".join(row) for row in (columns, ("---",) * len(columns), *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _speeds(rows: list[Record]) -> str:
    """Speed, waits and cache of each model, beside the plain one."""
    base = next((row for row in rows if row["model"] == "plain"), rows[0])
    deep = next((row for row in rows if row["model"].startswith("plain,")), None)
    speed, cache = [], []
    for row in rows:
        over, bare, allowed = (
            row[name] / base[name] for name in ("rate", "allowed_bare", "allowed")
        )
        speed.append(
            (
                row["model"],
                f"{row['slots']}",
                f"{row['rate']:,.0f}",
                f"{over:.2f}",
                f"{bare:.2f}",
                f"{allowed:.2f}",
                f"{over / max(bare, allowed):.2f}",
                f"{row['first_median']:.2f} / {row['first_p99']:.2f}",
                f"{row['between_median'] * 1e3:.0f} / {row['between_p99'] * 1e3:.0f}",
            )
        )
        stored = row["stored"] / base["stored"]
        stored_deep = f"{row['stored'] / deep['stored']:.2f}" if deep else "-"
        routed = len(row["shares"]) > 1
        cache.append(
            (
                row["model"],
                f"{sum(row['shares']):.2f}" if routed else "-",
                f"{row['useful']:.1%}",
                f"{row['host']:.1%}",
                f"{row['idle']:.1%}",
                f"{row['stored']:,.0f}",
                f"{row['given']:,.0f}",
                f"{stored:.2f}",
                stored_deep,
                f"{row['overflows']}",
                f"{row['preemptions']}",
            )
        )
    deeper = f"over {deep['model']}" if deep else "over the deeper"
    speeds = (
        "model",
        "slots",
        "tokens/s",
        "over plain",
        "FLOPs and bytes allow",
        "with attention",
        "of it",
    )
    waits = ("first token s, p50 / p99", "between ms, p50 / p99")
    caches = (
        "model",
        "mean depth",
        "useful rows",
        "host",
        "device idle",
        "KV bytes a token",
        "with pages",
    )
    more = ("over plain", deeper, "overflows", "preemptions")
    return f"{table((*speeds, *waits), speed)}\n{table((*caches, *more), cache)}"


def _gains(records: list[Record]) -> str:
    """Where the gain comes from: batching, exit, memory."""

    def rate(part: str, model: str, budget: int | None = None) -> float | None:
        for record in records:
            if (record["part"], record["model"], record.get("budget")) == (part, model, budget):
                return record["rate"]
        return None

    static, plain = rate("static", "plain"), rate("fixed", "plain")
    rows = []
    if static and plain:
        rows.append(("continuous batching", "plain: waves, then refilled at once", plain / static))
    exits = rate("fixed", "MoR-4")
    if exits and plain:
        rows.append(("early exit", "MoR-4 over plain, the same slots", exits / plain))
    for budget in sorted({r["budget"] for r in records if r["part"] == "budget"}):
        base = rate("budget", "plain", budget)
        for model in ("MoR-4", "MoR-4, shared KV"):
            same, more = rate("fixed", model), rate("budget", model, budget)
            if base and more and same and plain:
                what = f"{model} over plain, cache of {budget} plain sequences"
                rows.append(("exit and memory", what, more / base))
                gain = (more / base) / (same / plain)
                rows.append(("memory alone", f"that over {model} over plain, same slots", gain))
    lines = [(part, what, f"{gain:.2f}") for part, what, gain in rows]
    return (
        f"### Where the gain comes from\n\n{table(('part', 'ratio', 'gain'), lines)}"
        if rows
        else ""
    )


def _rival(records: list[Record]) -> str:
    rows = [
        (
            f"{record['slots']}",
            f"{record['rate']:,.0f}",
            f"{record['transformers_rate']:,.0f}",
            f"{record['rate'] / record['transformers_rate']:.2f}",
            f"{record['decode_rate']:,.0f}",
            f"{record['transformers_decode_rate']:,.0f}",
            f"{record['decode_rate'] / record['transformers_decode_rate']:.2f}",
            f"{record['same_tokens']:.1%}",
        )
        for record in records
        if record["part"] == "rival"
    ]
    columns = ("sequences", "ours, tokens/s", "transformers", "ratio")
    more = ("ours, decoding alone", "transformers, decoding alone", "ratio", "same tokens")
    head = "### Beside transformers.generate: plain, prompts and answers of 256 tokens, greedy\n\n"
    return f"{head}{table((*columns, *more), rows)}" if rows else ""
