"""Formats an evaluation for a terminal: aligned tables of losses."""

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"causal": "causal", "topk": "top-k"}
"""Display names of the routing modes, in the order of the tables."""

Row = Sequence[str]


def lines(text: str, values: Mapping[str, Any]) -> list[str]:
    """All tables. text: name of the data. values: as from `Evaluation.to_dict`."""
    routed = "loss_topk" in values
    head = f"{text}, {values['targets']:,} targets, {values['bytes']:,} bytes of text and "
    made = [f"{head}{values['document_ends']:,} document ends", ""]
    made += table(_losses(values, routed))
    if routed:
        made += ["", "causal: no later token is used, as in generation; top-k: the training rule;"]
        made += ["leak: causal loss minus top-k loss"]
    if len(values["sources"]) > 1:
        made += ["", *table(_sources(values["sources"], routed), left=1)]
    if routed:
        made += ["", "loss by depth of the predicting token, with the share of targets"]
        made += table(_depths(values["by_depth"]))
    made += ["", "loss by position in the sequence"]
    made += table(_positions(values["by_position"], routed))
    return made


def table(rows: Sequence[Row], left: int = 1) -> list[str]:
    """Rows of cells, aligned: the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    made = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)]
        made.append("  ".join(aligned).rstrip())
    return made


def _losses(values: Mapping[str, Any], routed: bool) -> list[Row]:
    made: list[Row] = [
        ("routing", "loss", "perplexity", "bits/byte", "accuracy", "mean depth"),
    ]
    for mode in NAMES if routed else ("causal",):
        made.append(
            (
                NAMES[mode] if routed else "none",
                f"{values[f'loss_{mode}']:.4f}",
                f"{values[f'perplexity_{mode}']:.2f}",
                _number(values[f"bits_per_byte_{mode}"]),
                f"{values[f'accuracy_{mode}']:.2%}",
                f"{values[f'depth_{mode}']:.2f}" if routed else "-",
            )
        )
    if routed:
        made.append(("leak", f"{values['leak']:+.4f}", "", "", "", ""))
    return made


def _sources(sources: Sequence[Mapping[str, Any]], routed: bool) -> list[Row]:
    shown = list(NAMES) if routed else ["causal"]
    heads = [NAMES[mode] for mode in shown] if routed else ["loss"]
    made: list[Row] = [("source", "targets", *heads, *(["leak"] if routed else []), "bits/byte")]
    for one in sources:
        losses = [_number(one[f"loss_{mode}"]) for mode in shown]
        leak = [f"{one['leak']:+.4f}"] if routed else []
        bits = _number(one["bits_per_byte_causal"])
        made.append((one["source"], f"{one['targets']:,}", *losses, *leak, bits))
    return made


def _depths(groups: Sequence[Mapping[str, Any]]) -> list[Row]:
    made: list[Row] = [("depth", *(x for name in NAMES.values() for x in (name, "share")))]
    for group in groups:
        cells = []
        if not any(group[f"targets_{mode}"] for mode in NAMES):
            continue
        for mode in NAMES:
            all_of_them = sum(other[f"targets_{mode}"] for other in groups)
            share = group[f"targets_{mode}"] / all_of_them
            cells += [_number(group[f"loss_{mode}"]), f"{share:.1%}"]
        made.append((str(group["depth"]), *cells))
    return made


def _positions(groups: Sequence[Mapping[str, Any]], routed: bool) -> list[Row]:
    shown = list(NAMES) if routed else ["causal"]
    heads = [NAMES[mode] for mode in shown] if routed else ["loss"]
    made: list[Row] = [("positions", "targets", *heads)]
    for group in groups:
        first, last = group["first"], group["last"]
        where = str(first) if first == last else f"{first}-{last}"
        losses = [_number(group[f"loss_{mode}"]) for mode in shown]
        made.append((where, f"{group['targets_causal']:,}", *losses))
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
