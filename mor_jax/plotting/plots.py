"""Figures of a run: loss curves, and a text coloured by the recursion depth of its tokens.

matplotlib is imported inside the functions, because its import would slow down the start of a run;
no window is ever opened.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mor_jax.observability import metrics
from mor_jax.plotting import titles

SERIES = {
    "training": "ce",
    "validation, top-k routing": "eval/loss_topk",
    "validation, causal routing": "eval/loss_causal",
}
"""Curves of `loss_curves`: label -> name in metrics.jsonl."""

_MARKS = ("#1d4ed8", "#15803d", "#7e22ce", "#111827")
_COLOURS = ("#8a93a6", "#c2410c", "#1d4ed8", "#15803d", "#7e22ce")
# Light to strong, all bright enough under black letters; the first is for depth 0.
_UNROUTED = "#e5e7eb"
_DEPTHS = ("#fef3c7", "#fdba74", "#f58a6e", "#c893c0", "#8f9fd6", "#6fb3b8", "#86c28b", "#b5b5b5")

PathLike = str | os.PathLike[str]

_TAB = 4
# Longest page: image heights are limited, so later text is cut off.
_ROWS = 400


def loss_curves(
    records: PathLike,
    path: PathLike,
    *,
    series: Mapping[str, str] = SERIES,
    baseline: float | int | None = None,
    title: str = "Loss",
) -> None:
    """Draws the losses in the `metrics.jsonl` at `records` over the steps, as a PNG at `path`.

    series: label -> name of a value; those without records are skipped. The first, noisy one is
    drawn faint with its running mean. baseline: loss of the bigram model, nats per token.
    Raises `ValueError` when the file holds none of the series.
    """
    rows = metrics.read(records)
    curves = {label: _curve(rows, name) for label, name in series.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve)}
    if not curves:
        names = sorted(series.values())
        raise ValueError(f"{records}: has no finite value of {names}. Train a few steps first")
    figure = new_figure(9.0, 5.0)
    axes = figure.add_axes((0.085, 0.11, 0.885, 0.8))
    for colour, (label, curve) in zip(_COLOURS, curves.items(), strict=False):
        noisy = label == next(iter(series)) and len(curve) > 20
        if noisy:
            axes.plot(curve[:, 0], curve[:, 1], color=colour, alpha=0.3, linewidth=0.8)
            curve = _smooth(curve)
        last = f"{label}: {curve[-1, 1]:.3f}"
        # The two validation curves often coincide: dashes let the lower one show through.
        dashes = (0, (4, 4)) if label == list(curves)[-1] and len(curves) > 2 else "solid"
        marker = "o" if len(curve) < 40 else None
        axes.plot(
            *curve.T,
            color=colour,
            linewidth=1.8,
            marker=marker,
            markersize=3.5,
            label=last,
            linestyle=dashes,
        )
    if baseline is not None:
        label = f"bigram model: {baseline:.3f}"
        axes.axhline(baseline, color="#111827", linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    _style(axes, title)
    write_figure(figure, path)


def depth_curve(
    points: Sequence[tuple[str, float, float, bool]], path: PathLike, *, title: str = "Depth"
) -> None:
    """Draws loss over mean depth as a PNG at `path`.

    points: name, recursions per token, nats per token, and whether the point is on the curve; the
    others are marked with their names.
    """
    curve = sorted((depth, loss) for _, depth, loss, on in points if on)
    figure = new_figure(9.0, 5.0)
    axes = figure.add_axes((0.085, 0.11, 0.885, 0.8))
    label = "calibrated, causal routing"
    axes.plot(*zip(*curve, strict=True), color=_COLOURS[1], linewidth=1.8, marker="o", label=label)
    marked = [(name, depth, loss) for name, depth, loss, on in points if not on]
    for (name, depth, loss), colour in zip(marked, itertools.cycle(_MARKS), strict=False):
        label = f"{name}: {loss:.3f} at {depth:.2f}"
        axes.plot(depth, loss, "D", markersize=7, color=colour, label=label)
    _style(axes, title, "mean recursions per token")
    write_figure(figure, path)


def depth_map(
    pieces: Sequence[str],
    depths: Sequence[int] | np.ndarray,
    path: PathLike,
    *,
    recursions: int | None = None,
    title: str = "Recursions per token",
    columns: int = 96,
) -> None:
    """Draws a text as a page of monospaced letters on the colour of each token's depth, as a PNG.

    pieces: text of each token, as from `text_pieces`. depths: recursions that each token ran,
    0 for none, one per piece. recursions: entries of the legend, by default the largest
    depth. Spaces, tabs, newlines and control characters are shown as faint signs, a character that
    the font lacks as a box. Text beyond 400 rows is cut off. Raises `ValueError` if the two differ
    in length or are empty.
    """
    depths = [int(depth) for depth in depths]
    if len(pieces) != len(depths) or not pieces:
        fix = "Give one depth per piece, at least one"
        raise ValueError(f"depth_map: {len(pieces)} pieces, {len(depths)} depths. {fix}")
    cells = _lay_out(pieces, depths, columns)
    shown = range(0 if 0 in depths else 1, max(recursions or 0, *depths) + 1)
    page = _Page(cells, title, len(shown))
    page.backgrounds(cells)
    page.letters(cells)
    page.legend([(depth, depths.count(depth) / len(depths)) for depth in shown])
    write_figure(page.figure, path)


def text_pieces(tokens: Sequence[int] | np.ndarray, decode: Callable[[Any], str]) -> list[str]:
    """The text that each token adds when decoded in order; joined, they give the whole text.

    A character spread over several tokens belongs to the last of them; the others get "".
    """
    pieces: list[str] = []
    start = before = 0
    for end in range(1, len(tokens) + 1):
        # One finished group as context: some tokenizers drop the space of a first token.
        context = len(decode(tokens[before:start])) if start else 0
        text = decode(tokens[before:end])[context:]
        if text.endswith("\ufffd") and end < len(tokens) and end - start < 4:
            pieces.append("")
            continue
        pieces.append(text)
        before, start = start, end
    return pieces


@dataclasses.dataclass(frozen=True)
class _Cell:
    # One letter on the page; `faint` for signs that replace invisible characters.
    row: int
    column: int
    letter: str
    faint: bool
    token: int
    depth: int
    width: int = 1


def _lay_out(pieces: Sequence[str], depths: Sequence[int], columns: int) -> list[_Cell]:
    cells, row, column = [], 0, 0
    has = _has_glyph()
    for token, (piece, depth) in enumerate(zip(pieces, depths, strict=True)):
        for char in piece:
            letter, faint = _visible(char, has)
            width = _TAB - column % _TAB if char == "\t" else 1
            if column + width > columns:
                row, column = row + 1, 0
            if row == _ROWS:
                return cells
            cells.append(_Cell(row, column, letter, faint, token, depth, width))
            column += width
            if char == "\n":
                row, column = row + 1, 0
    return cells


def _visible(char: str, has: Callable[[str], bool]) -> tuple[str, bool]:
    signs = {" ": "·", "\n": "↵", "\t": "→", "\u00a0": "·"}
    if char in signs:
        return signs[char], True
    if char.isprintable() and has(char):
        return char, False
    return "▯", True


def _has_glyph() -> Callable[[str], bool]:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    return lambda char: font.get_char_index(ord(char)) != 0


class _Page:
    """A figure of letters in a grid. One path for all letters: text objects would take seconds."""

    _CELL = (0.082, 0.17)
    _MARGIN = 0.3
    _HEAD = 0.85
    _TITLE = (10.5, 0.2)
    _ENTRY = (0.82, 0.22)

    def __init__(self, cells: Sequence[_Cell], title: str, entries: int):
        """entries: of the legend. Title and legend take as many lines as they need."""
        width, height = self._CELL
        rows = 1 + max((cell.row for cell in cells), default=0)
        # Space for the title and the legend above a text of short lines.
        columns = max([cell.column + cell.width for cell in cells] + [72])
        self._title = titles.wrapped(title, columns * width, self._TITLE[0])
        self._across = int(columns * width / self._ENTRY[0])
        more = (len(self._title) - 1) * self._TITLE[1]
        more += (-(-entries // self._across) - 1) * self._ENTRY[1]
        self._head = self._HEAD + more
        self._size = (columns * width + 2 * self._MARGIN, rows * height + self._head + self._MARGIN)
        self.figure = new_figure(*self._size)
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, self._size[0]), ylim=(self._size[1], 0))
        self._axes.set_axis_off()

    def backgrounds(self, cells: Sequence[_Cell]) -> None:
        from matplotlib.collections import PolyCollection

        boxes, colours = [], []
        for run in _runs(cells):
            left, top = self._corner(run[0])
            right = left + sum(cell.width for cell in run) * self._CELL[0]
            # Thin gaps keep neighbouring tokens of one colour apart.
            right, bottom = right - 0.01, top + self._CELL[1] - 0.012
            boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            colours.append(colour(run[0].depth))
        self._axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none"))

    def letters(self, cells: Sequence[_Cell]) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        outline = _outlines()
        for faint, colour in ((False, "#111827"), (True, "#4b5563")):
            paths = []
            for cell in cells:
                if cell.faint == faint and cell.letter:
                    left, top = self._corner(cell)
                    paths.append(outline(cell.letter, left, top + self._CELL[1] * 0.74))
            if paths:
                patch = PathPatch(Path.make_compound_path(*paths), facecolor=colour, linewidth=0)
                self._axes.add_patch(patch)

    def legend(self, shares: Sequence[tuple[int, float]]) -> None:
        """The title, and below it each depth with its share of the tokens."""
        from matplotlib.patches import Rectangle

        axes, y = self._axes, self._MARGIN
        style = {"va": "center", "color": "#111827", "family": "DejaVu Sans", "parse_math": False}
        for number, line in enumerate(self._title):
            y = self._MARGIN + number * self._TITLE[1]
            axes.text(self._MARGIN, y, line, fontsize=self._TITLE[0], weight="bold", **style)
        for number, (depth, share) in enumerate(shares):
            row, column = divmod(number, self._across)
            left, at = self._MARGIN + column * self._ENTRY[0], y + 0.27 + row * self._ENTRY[1]
            axes.add_patch(Rectangle((left, at - 0.075), 0.2, 0.15, facecolor=colour(depth)))
            axes.text(left + 0.26, at, f"{depth}: {share:.0%}", fontsize=8.5, **style)

    def _corner(self, cell: _Cell) -> tuple[float, float]:
        width, height = self._CELL
        return self._MARGIN + cell.column * width, self._head + cell.row * height


def _runs(cells: Sequence[_Cell]) -> Iterator[list[_Cell]]:
    # Neighbouring cells of one token on one row.
    run: list[_Cell] = []
    for cell in cells:
        if run and (cell.token, cell.row) != (run[0].token, run[0].row):
            yield run
            run = []
        run.append(cell)
    if run:
        yield run


def _outlines() -> Callable[[str, float, float], Any]:
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    font, size, cache = FontProperties(family="DejaVu Sans Mono"), 0.132, {}

    def outline(letter: str, x: float, y: float) -> Any:
        if letter not in cache:
            cache[letter] = TextPath((0, 0), letter, size=size, prop=font, usetex=False)
        shape = cache[letter]
        # The page counts downwards, letters upwards.
        return Path(shape.vertices * [1, -1] + [x, y], shape.codes)

    return outline


def colour(depth: int) -> str:
    """`#rrggbb` of a depth, bright enough under black letters."""
    return _UNROUTED if depth <= 0 else _DEPTHS[(depth - 1) % len(_DEPTHS)]


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    # (points, 2): step and value; non-finite values are skipped; the curve continues across them.
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    curve = np.array(points, np.float64).reshape(-1, 2)
    return curve[np.isfinite(curve[:, 1])]


def _smooth(curve: np.ndarray) -> np.ndarray:
    width = max(len(curve) // 25, 3) | 1
    padded = np.pad(curve[:, 1], width // 2, mode="edge")
    mean = np.convolve(padded, np.ones(width) / width, mode="valid")
    return np.stack([curve[:, 0], mean], axis=1)


def _style(axes: Any, title: str, across: str = "optimiser step") -> None:
    lines = titles.wrapped(title, 8.0, titles.SIZE)
    left, bottom, width, height = axes.get_position().bounds
    lower = (len(lines) - 1) * titles.LINE / axes.figure.get_size_inches()[1]
    axes.set_position((left, bottom, width, height - lower))
    style = {"loc": "left", "fontsize": titles.SIZE, "weight": "bold", "parse_math": False}
    axes.set_title("\n".join(lines), **style)
    axes.set_xlabel(across)
    axes.set_ylabel("cross-entropy, nats per token")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9.5)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure. width, height: inches."""
    # A bare Figure renders through Agg and needs no display, whatever backend is configured.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def write_figure(figure: Any, path: PathLike) -> None:
    """Writes a figure as a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_figure(path, dpi=160, format="png")
