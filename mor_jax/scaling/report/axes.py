"""Axes, labels and files that the figures of studies share."""

import io
import math
from collections.abc import Sequence
from typing import Any

from mor_jax.observability.number_format import quantity

INK, FAINT, _GRID = "#1f2937", "#6b7280", "#e5e7eb"


def new_figure(count: int, *, width: float = 4.2, shared: bool = False) -> tuple[Any, list[Any]]:
    """A figure and `count` axes of it, in rows of two or three."""
    # A bare Figure renders through Agg and needs no display, whatever backend is configured.
    from matplotlib.figure import Figure

    columns = min(count, 2 if count == 4 else 3)
    rows = math.ceil(count / columns)
    size = (max(width * columns, 6.0), 3.9 * rows + 0.7)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes in panels[:count]:
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5, colors=INK, labelbottom=True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panels[:count]


def title(axes: Any, text: str, colour: str = INK) -> None:
    """Names one panel."""
    axes.set_title(text, loc="left", fontsize=10.5, color=colour, weight="bold")


def labels(panels: Sequence[Any], across: str, up: str) -> None:
    """Names the axes of a grid; those up only at its left."""
    columns = panels[0].get_gridspec().ncols
    for i, axes in enumerate(panels):
        axes.set_xlabel(across, fontsize=9)
        if i % columns == 0:
            axes.set_ylabel(up, fontsize=9)


def sizes(axes: Any) -> None:
    """Makes the axis across one of parameters, logarithmic."""
    axes.set_xscale("log")
    ticks(axes.xaxis)


def ticks(axis: Any) -> None:
    """Round numbers with units on a logarithmic axis, as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    if high / low > 300:
        steps = (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    axis.set_minor_formatter(NullFormatter())


def png(figure: Any, title: str) -> bytes:
    """Renders the finished figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.suptitle(title, fontsize=12.5, weight="bold", color=INK, x=0.01, ha="left")
    FigureCanvasAgg(figure)
    page = io.BytesIO()
    figure.savefig(page, format="png", dpi=115)
    return page.getvalue()


__all__ = ["FAINT", "INK", "labels", "new_figure", "png", "sizes", "ticks", "title"]
