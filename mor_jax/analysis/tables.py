"""Statistics as tables for a terminal. Each table begins with an empty line."""

from collections.abc import Sequence
from typing import Any

from mor_jax.analysis.routing_record import ROUTINGS

Record = dict[str, Any]

GROUPED = {
    "token": "by token",
    "part_of_speech": "by part of speech",
    "frequency": "by frequency of the token in the training text",
    "loss": "by loss of the token itself, nats, deciles",
    "loss_ahead": "by loss of the next token, nats, deciles",
    "position": "by position in the sequence",
}
"""Statistics of groups of tokens -> titles."""

LISTED_EXTREMES = 8
"""Token types listed at each end of the ranking by depth."""

LISTED_TYPES = 16
"""Token types listed that never reach the last recursion."""


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def routings(records: Sequence[Record]) -> list[str]:
    """The whole text: one line per routing."""
    lines = ["", f"{'routing':<10}{'mean depth':>11}{'loss':>9}   share of tokens by depth"]
    for record in records:
        shares = enumerate(record["shares"])
        each = "  ".join(f"{depth}: {share:.1%}" for depth, share in shares if share or depth)
        loss = _format(record["ahead"], ".4f")
        lines.append(f"{ROUTINGS[record['routing']]:<10}{record['depth']:>11.3f}{loss:>9}   {each}")
    return lines


def agreement(records: Sequence[Record]) -> list[str]:
    """Agreement of causal and top-k routing: one line per recursion and kind of comparison."""
    if not records:
        return []
    head = f"{'':<12}{'compared on':<22}{'causal':>8}{'top-k':>8}{'accuracy':>10}"
    lines = ["", "agreement of causal and top-k routing, per recursion"]
    lines.append(f"{head}{'precision':>11}{'recall':>8}{'Jaccard':>9}")
    comparisons = {"topk": "top-k's candidates", "own": "all, separate passes"}
    for record in records:
        name = f"recursion {record['recursion']}"
        if record["takes_all"]:
            if record["states"] == "own":
                lines.append(f"{name:<12}takes every token")
            continue
        counts = [record[rule] / max(record["tokens"], 1) for rule in ("causal", "topk")]
        shares = "".join(f"{share:>8.1%}" for share in counts)
        cells = [_format(record[k], ".3f") for k in ("accuracy", "precision", "recall", "jaccard")]
        values = f"{cells[0]:>10}{cells[1]:>11}{cells[2]:>8}{cells[3]:>9}"
        lines.append(f"{name:<12}{comparisons[record['states']]:<22}{shares}{values}")
    return lines


def choice(records: Sequence[Record]) -> list[str]:
    """Token-choice: distribution of the selected depths."""
    lines = []
    for record in records:
        each = "  ".join(
            f"{depth + 1}: {share:.1%}" for depth, share in enumerate(record["shares"])
        )
        worst = f"largest share {record['max_violation']:+.0%} relative to uniform"
        lines += [
            "",
            f"selected depths  {each}",
            f"{worst}; entropy {record['entropy']:.3f} of uniform",
        ]
        if "overflow" in record:
            dropped = f"{record['overflow']:.1%} of tokens"
            lines.append(f"dropped for lack of capacity under top-k routing: {dropped}")
    return lines


def scores(records: Sequence[Record]) -> list[str]:
    """How well router scores separate selected tokens from the other candidates."""
    lines = ["", "router scores, selected tokens against the other candidates"]
    head = f"{'':<22}{'mean selected':>14}{'mean other':>12}{'AUROC':>8}{'overlap':>9}"
    lines.append(f"{head}{'0.1 to 0.9':>12}{'threshold':>11}")
    for record in records:
        name = f"recursion {record['recursion']}"
        name += ", main router" if record["router"] == "main" else ""
        cells = [
            _format(record[k], ".3f") for k in ("mean_chosen", "mean_other", "auroc", "overlap")
        ]
        lines.append(
            f"{name:<22}{cells[0]:>14}{cells[1]:>12}{cells[2]:>8}{cells[3]:>9}"
            f"{_format(record['undecided'], '.1%'):>12}{_format(record['threshold'], '.3f'):>11}"
        )
    return lines


def savings(records: Sequence[Record]) -> list[str]:
    """KV cache and forward FLOPs: one line per routing."""
    lines = ["", "KV cache per token, relative to all tokens at all layers"]
    lines.append(
        f"{'routing':<10}{'entries':>9}{'of':>6}{'bytes':>10}{'of':>9}{'saved':>8}{'work':>8}"
    )
    for record in records:
        lines.append(
            f"{ROUTINGS[record['routing']]:<10}{record['entries']:>9.2f}{record['dense_entries']:>6}"
            f"{record['bytes']:>10,.0f}{record['dense_bytes']:>9,.0f}{record['saved']:>8.1%}"
            f"{record['work']:>8.1%}"
        )
    return lines


def dead(records: Sequence[Record], tokens: Sequence[Record]) -> list[str]:
    """Tokens that no recursion selects; positions and token types that never reach the last one."""
    first = records[0]
    measures = {
        "tokens that no recursion selects": ("tokens", ""),
        "positions without the last recursion": ("positions", f"of {first['rows']} sequences"),
        "token types without the last recursion": (
            "kinds",
            f"of {first['of_kinds']} that occur at least {first['min_count']} times",
        ),
    }
    lines = [
        "",
        f"{'last recursion not reached':<40}"
        + "".join(f"{ROUTINGS[r['routing']]:>8}" for r in records),
    ]
    for name, (field, of) in measures.items():
        values = "".join(f"{_format(record[field], '.1%'):>8}" for record in records)
        lines.append(f"{name:<40}{values}   {of}".rstrip())
    names_by_token = {record["token"]: record["group"] for record in tokens}
    for record in records:
        names = [names_by_token[token] for token in record["dead_kinds"][:LISTED_TYPES]]
        more = len(record["dead_kinds"]) - len(names)
        if names:
            cells = f"{' '.join(names)}{f' and {more} more' if more else ''}"
            lines.append(f"  {ROUTINGS[record['routing']]}: {cells}")
    return lines


def extremes(records: Sequence[Record], min_count: int) -> list[str]:
    """The deepest and the shallowest token types, side by side."""
    listed = [record for record in records if record["tokens"] >= min_count]
    ordered = sorted(listed, key=lambda record: (record["depth"], -record["tokens"]))
    count = min(LISTED_EXTREMES, (len(ordered) + 1) // 2)
    lines = [
        "",
        f"depth by token, of {len(listed)} token types that occur at least {min_count} times",
    ]
    lines.append(
        f"{'deepest':<16}{'count':>8}{'depth':>7}    {'shallowest':<16}{'count':>8}{'depth':>7}"
    )
    for deep, shallow in zip(ordered[::-1][:count], ordered[:count], strict=True):
        lines.append(f"{_token(deep)}    {_token(shallow)}")
    return lines


def _token(record: Record) -> str:
    return f"{record['group'][:15]:<16}{record['tokens']:>8,}{record['depth']:>7.2f}"


def grouped(title: str, records: Sequence[Record]) -> list[str]:
    """Depth and loss of groups of tokens."""
    width = max(16, *(len(record["group"]) + 2 for record in records))
    lines = ["", f"depth {title}"]
    lines.append(f"{'':<{width}}{'tokens':>9}{'depth':>7}{'loss':>8}{'next':>8}")
    for record in records:
        losses = [_format(record[name], ".3f") for name in ("loss", "ahead")]
        lines.append(
            f"{record['group']:<{width}}{record['tokens']:>9,}{record['depth']:>7.2f}"
            f"{losses[0]:>8}{losses[1]:>8}"
        )
    return lines
