"""Titles and legends that stay inside a figure, however long a run's name or its legend is.

matplotlib is imported inside the functions, as in `plots`.
"""

import functools
from typing import Any

SIZE, LINE = 12.0, 0.2
"""Points of a figure's title, and inches from one of its lines to the next."""

_SIDE = 0.02
"""Fraction of a figure's width that its title leaves free on each side."""

_HEAD = 0.3
"""Height of a one-line head, inches."""

_ENTRY = 1.25
"""Width of a legend entry such as `100 recursions`, inches."""


def text_width(text: str, size: float) -> float:
    """Width of a line of bold text in inches, without kerning. size: points."""
    return size * sum(map(_advance, text)) / 72


@functools.cache
def _advance(char: str) -> float:
    """Width of a letter of one point."""
    from matplotlib import font_manager

    face = font_manager.FontProperties(family="DejaVu Sans", weight="bold")
    font = font_manager.get_font(font_manager.findfont(face))
    font.set_size(100, 72)
    # In 65536ths of a pixel, of which there are as many as points.
    return font.load_char(ord(char)).linearHoriAdvance / 65536 / 100


def wrapped(text: str, inches: float, size: float) -> list[str]:
    """Lines of bold text no wider than `inches`; wider words are split."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(longer, size) <= inches:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for char in word:
            if lines[-1] and text_width(lines[-1] + char, size) > inches:
                lines.append("")
            lines[-1] += char
    return lines


def title(figure: Any, text: str, legend: tuple[list[Any], list[str]] | None = None) -> float:
    """Writes a title, and a legend beside or below it, at the top of a figure, which grows to fit.

    Returns the fraction of the figure's height below it. legend: handles and short labels.
    """
    width, height = figure.get_size_inches()
    line_width, number = width * (1 - 2 * _SIDE), 0 if legend is None else len(legend[1])
    beside = text_width(text, SIZE) + number * _ENTRY <= line_width
    lines = wrapped(text, line_width, SIZE)
    columns = number if beside else min(number, int(line_width / _ENTRY))
    below = 0 if beside or not number else -(-number // columns)
    more = (len(lines) - 1 + below) * LINE
    height, head = height + more, _HEAD + more
    figure.set_size_inches(width, height)
    style: dict[str, Any] = {"x": _SIDE, "y": 1 - 0.08 / height, "ha": "left", "va": "top"}
    style |= {"weight": "bold", "fontsize": SIZE, "parse_math": False, "in_layout": False}
    figure.suptitle("\n".join(lines), **style)
    if legend is not None:
        top = 1.0 if beside else 1 - (0.1 + len(lines) * LINE) / height
        position = {"loc": "upper right", "bbox_to_anchor": (1, top), "ncols": columns}
        figure.legend(*legend, frameon=False, fontsize=9, **position)
    return 1 - head / height
