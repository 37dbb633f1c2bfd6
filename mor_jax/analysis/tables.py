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

EXTREMES = 8
"""Token types listed at each end of the ranking by depth."""

NAMED = 16
"""Token types listed that never reach the last recursion."""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def routings(records: Sequence[Record]) -> list[str]:
    """The whole text: one line per routing."""
    made = ["", f"{'routing':<10}{'mean depth':>11}{'loss':>9}   share of tokens by depth"]
    for one in records:
        shares = enumerate(one["shares"])
        each = "  ".join(f"{depth}: {share:.1%}" for depth, share in shares if share or depth)
        loss = _number(one["ahead"], ".4f")
        made.append(f"{ROUTINGS[one['routing']]:<10}{one['depth']:>11.3f}{loss:>9}   {each}")
    return made


def agreement(records: Sequence[Record]) -> list[str]:
    """Agreement of causal and top-k routing: one line per recursion and kind of comparison."""
    if not records:
        return []
    head = f"{'':<12}{'compared on':<22}{'causal':>8}{'top-k':>8}{'accuracy':>10}"
    made = ["", "agreement of causal and top-k routing, per recursion"]
    made.append(f"{head}{'precision':>11}{'recall':>8}{'Jaccard':>9}")
    asked = {"topk": "top-k's candidates", "own": "all, separate passes"}
    for one in records:
        name = f"recursion {one['recursion']}"
        if one["takes_all"]:
            if one["states"] == "own":
                made.append(f"{name:<12}takes every token")
            continue
        counts = [one[rule] / max(one["tokens"], 1) for rule in ("causal", "topk")]
        shares = "".join(f"{share:>8.1%}" for share in counts)
        cells = [_number(one[k], ".3f") for k in ("accuracy", "precision", "recall", "jaccard")]
        values = f"{cells[0]:>10}{cells[1]:>11}{cells[2]:>8}{cells[3]:>9}"
        made.append(f"{name:<12}{asked[one['states']]:<22}{shares}{values}")
    return made


def choice(records: Sequence[Record]) -> list[str]:
    """Token-choice: distribution of the selected depths."""
    made = []
    for one in records:
        each = "  ".join(f"{depth + 1}: {share:.1%}" for depth, share in enumerate(one["shares"]))
        worst = f"largest share {one['max_violation']:+.0%} relative to uniform"
        made += [
            "",
            f"selected depths  {each}",
            f"{worst}; entropy {one['entropy']:.3f} of uniform",
        ]
        if "overflow" in one:
            made.append(
                f"dropped for lack of capacity under top-k routing: {one['overflow']:.1%} of tokens"
            )
    return made


def scores(records: Sequence[Record]) -> list[str]:
    """How well router scores separate selected tokens from the other candidates."""
    made = ["", "router scores, selected tokens against the other candidates"]
    head = f"{'':<22}{'mean selected':>14}{'mean other':>12}{'AUROC':>8}{'overlap':>9}"
    made.append(f"{head}{'0.1 to 0.9':>12}{'threshold':>11}")
    for one in records:
        name = f"recursion {one['recursion']}"
        name += ", main router" if one["router"] == "main" else ""
        cells = [_number(one[k], ".3f") for k in ("mean_chosen", "mean_other", "auroc", "overlap")]
        made.append(
            f"{name:<22}{cells[0]:>14}{cells[1]:>12}{cells[2]:>8}{cells[3]:>9}"
            f"{_number(one['undecided'], '.1%'):>12}{_number(one['threshold'], '.3f'):>11}"
        )
    return made


def savings(records: Sequence[Record]) -> list[str]:
    """KV cache and forward FLOPs: one line per routing."""
    made = ["", "KV cache per token, relative to all tokens at all layers"]
    made.append(
        f"{'routing':<10}{'entries':>9}{'of':>6}{'bytes':>10}{'of':>9}{'saved':>8}{'work':>8}"
    )
    for one in records:
        made.append(
            f"{ROUTINGS[one['routing']]:<10}{one['entries']:>9.2f}{one['dense_entries']:>6}"
            f"{one['bytes']:>10,.0f}{one['dense_bytes']:>9,.0f}{one['saved']:>8.1%}"
            f"{one['work']:>8.1%}"
        )
    return made


def dead(records: Sequence[Record], tokens: Sequence[Record]) -> list[str]:
    """Tokens that no recursion selects; positions and token types that never reach the last one."""
    first = records[0]
    rows = {
        "tokens that no recursion selects": ("tokens", ""),
        "positions without the last recursion": ("positions", f"of {first['rows']} sequences"),
        "token types without the last recursion": (
            "kinds",
            f"of {first['of_kinds']} that occur at least {first['min_count']} times",
        ),
    }
    made = [
        "",
        f"{'last recursion not reached':<40}"
        + "".join(f"{ROUTINGS[r['routing']]:>8}" for r in records),
    ]
    for name, (field, of) in rows.items():
        values = "".join(f"{_number(record[field], '.1%'):>8}" for record in records)
        made.append(f"{name:<40}{values}   {of}".rstrip())
    names = {record["token"]: record["group"] for record in tokens}
    for one in records:
        kinds = [names[token] for token in one["dead_kinds"][:NAMED]]
        more = len(one["dead_kinds"]) - len(kinds)
        if kinds:
            cells = f"{' '.join(kinds)}{f' and {more} more' if more else ''}"
            made.append(f"  {ROUTINGS[one['routing']]}: {cells}")
    return made


def extremes(records: Sequence[Record], min_count: int) -> list[str]:
    """The deepest and the shallowest token types, side by side."""
    judged = [record for record in records if record["tokens"] >= min_count]
    ordered = sorted(judged, key=lambda record: (record["depth"], -record["tokens"]))
    number = min(EXTREMES, (len(ordered) + 1) // 2)
    made = [
        "",
        f"depth by token, of {len(judged)} token types that occur at least {min_count} times",
    ]
    made.append(
        f"{'deepest':<16}{'count':>8}{'depth':>7}    {'shallowest':<16}{'count':>8}{'depth':>7}"
    )
    for deep, shallow in zip(ordered[::-1][:number], ordered[:number], strict=True):
        made.append(f"{_token(deep)}    {_token(shallow)}")
    return made


def _token(one: Record) -> str:
    return f"{one['group'][:15]:<16}{one['tokens']:>8,}{one['depth']:>7.2f}"


def grouped(title: str, records: Sequence[Record]) -> list[str]:
    """Depth and loss of groups of tokens."""
    width = max(16, *(len(record["group"]) + 2 for record in records))
    made = ["", f"depth {title}"]
    made.append(f"{'':<{width}}{'tokens':>9}{'depth':>7}{'loss':>8}{'next':>8}")
    for one in records:
        losses = [_number(one[name], ".3f") for name in ("loss", "ahead")]
        made.append(
            f"{one['group']:<{width}}{one['tokens']:>9,}{one['depth']:>7.2f}"
            f"{losses[0]:>8}{losses[1]:>8}"
        )
    return made
