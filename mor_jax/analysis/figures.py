"""Figures of an analysis: depth of groups of tokens, router scores, loss over recursions.

Only the functions of `plots` import matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mor_jax.analysis.routing_record import ROUTINGS
from mor_jax.plotting import plots, titles

Record = Mapping[str, Any]

_SELECTED, _OTHER, _LINE = "#c2410c", "#c3c9d5", "#111827"
_COUNTS = ("bins_other", "bins_chosen")


def depth_figure(
    grouped: Mapping[str, Sequence[Record]], recursions: int, about: str, path: plots.PathLike
) -> None:
    """Writes a PNG with one panel per statistic: a bar per group, divided by depth.

    The mean depth stands above each bar. grouped: title -> records of groups; statistics without
    records have no panel.
    """
    shown = {title: records for title, records in grouped.items() if records}
    figure = plots.new_figure(13.0, 0.75 + 3.1 * -(-len(shown) // 2))
    for panel, (title, records) in enumerate(shown.items()):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, panel + 1)
        _depth_panel(axes, title, records, recursions)
    label = f"Recursions per token, mean above each bar: {about}"
    below = titles.title(figure, label, figure.axes[0].get_legend_handles_labels())
    figure.tight_layout(rect=(0, 0, 1, below))
    plots.write_figure(figure, path)


def _depth_panel(axes: Any, title: str, records: Sequence[Record], recursions: int) -> None:
    positions, below = np.arange(len(records)), np.zeros(len(records))
    shares = np.array([record["shares"] for record in records])
    for depth in range(recursions + 1):
        if depth == 0 and not shares[:, 0].any():
            continue
        label = f"{depth} recursion{'s' * (depth != 1)}"
        colour = plots.colour(depth)
        axes.bar(positions, shares[:, depth], bottom=below, color=colour, width=0.85, label=label)
        below = below + shares[:, depth]
    for x, record in zip(positions, records, strict=True):
        axes.text(x, 1.02, f"{record['depth']:.2f}", ha="center", fontsize=7, color=_LINE)
    axes.set_title(title[0].upper() + title[1:], loc="left", fontsize=9.5, pad=14)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of tokens", fontsize=8.5)
    names = [record["group"] for record in records]
    rotated = max(len(name) for name in names) > 3
    axes.set_xticks(
        positions,
        names,
        fontsize=7,
        rotation=40 if rotated else 0,
        ha="right" if rotated else "center",
        parse_math=False,
    )
    axes.tick_params(axis="y", labelsize=8)
    _hide_spines(axes)


def score_figure(records: Sequence[Record], about: str, path: plots.PathLike) -> None:
    """Writes a PNG with one panel per recursion: scores of selected tokens and of the others."""
    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure = plots.new_figure(max(4.2 * columns, 7.0), 0.7 + 3.2 * rows)
    below = titles.title(figure, f"Router scores: {about}")
    for panel, record in enumerate(records):
        axes = figure.add_subplot(rows, columns, panel + 1)
        edges = np.linspace(0, 1, len(record["bins_chosen"]) + 1)
        width = edges[1]
        shares = [np.array(record[name]) / max(record["candidates"], 1) for name in _COUNTS]
        axes.bar(edges[:-1], shares[0], width, align="edge", color=_OTHER, label="other candidates")
        outline = np.append(shares[1], 0)
        axes.step(edges, outline, where="post", color=_SELECTED, linewidth=1.6, label="selected")
        if record["threshold"] is not None:
            label = f"threshold {record['threshold']:.2f}"
            axes.axvline(
                record["threshold"], color=_LINE, linestyle=(0, (4, 3)), linewidth=1, label=label
            )
        router = ", main router" if record["router"] == "main" else ""
        auroc = ", all candidates selected" if record["chosen"] == record["candidates"] else ""
        auroc = auroc if record["auroc"] is None else f", AUROC {record['auroc']:.3f}"
        label = f"Recursion {record['recursion']}{router}, {ROUTINGS[record['routing']]}{auroc}"
        axes.set_title(label, loc="left", fontsize=9.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("score, 0 to 1", fontsize=8.5)
        axes.set_ylabel("share of candidates (log)", fontsize=8.5)
        axes.set_yscale("log")
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8)
        _hide_spines(axes)
    figure.tight_layout(rect=(0, 0, 1, below))
    plots.write_figure(figure, path)


def recursion_figure(
    curves: Mapping[str, Sequence[Record]], trained: int, about: str, path: plots.PathLike
) -> None:
    """Writes a PNG of loss and of forward FLOPs against the number of recursions.

    curves: display name of a routing ("" for a model without routers) -> records. trained: the
    number of recursions in training.
    """
    figure = plots.new_figure(12.0, 4.6)
    below = titles.title(figure, f"Recursions at test time: {about}")
    panels = (
        ("loss", "cross-entropy, nats per token"),
        ("work", f"forward FLOPs; 1: all tokens at {trained} recursions"),
    )
    for panel, (field, ylabel) in enumerate(panels):
        axes = figure.add_subplot(1, 2, panel + 1)
        for (routing, records), colour in zip(curves.items(), (_SELECTED, "#1d4ed8"), strict=False):
            recursions = [record["recursions"] for record in records]
            values = [record[field] for record in records]
            dashes = "solid" if colour == _SELECTED else (0, (4, 4))
            label = f"{routing} routing" if routing else "every token at every recursion"
            axes.plot(
                recursions, values, "o", linestyle=dashes, color=colour, markersize=5, label=label
            )
        axes.axvline(
            trained, color=_LINE, linestyle=":", linewidth=1.2, label=f"trained: {trained}"
        )
        axes.set_xticks(recursions)
        axes.set_xlabel("recursions")
        axes.set_ylabel(ylabel)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9)
        _hide_spines(axes)
    figure.tight_layout(rect=(0, 0, 1, below))
    plots.write_figure(figure, path)


def _hide_spines(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
