"""Titles and legends that stay inside a picture, however long a run's name or its legend is.

matplotlib is imported inside the functions, as in `plots`.
"""

import functools
from typing import Any

SIZE, LINE = 12.0, 0.2
"""Points of a figure's title, and inches from one of its lines to the next."""

_SIDE = 0.02
"""Share of a figure's width that its title leaves free at either side."""

_HEAD = 0.3
"""Inches of a head of one line."""

_ENTRY = 1.25
"""Inches of an entry of a figure's legend, `100 recursions`."""


def text_width(text: str, size: float) -> float:
    """Inches that a line of bold text takes in a picture, kerning aside. size: points."""
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
    """Lines of bold text that are not wider than `inches`; words that are get cut."""
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
    """Writes a title, and a legend beside or below it, at the top of a figure, which grows for it.

    Returns the share of the figure's height below it. legend: handles and labels, short ones.
    """
    width, height = figure.get_size_inches()
    room, number = width * (1 - 2 * _SIDE), 0 if legend is None else len(legend[1])
    beside = text_width(text, SIZE) + number * _ENTRY <= room
    lines = wrapped(text, room, SIZE)
    columns = number if beside else min(number, int(room / _ENTRY))
    below = 0 if beside or not number else -(-number // columns)
    more = (len(lines) - 1 + below) * LINE
    height, head = height + more, _HEAD + more
    figure.set_size_inches(width, height)
    style: dict[str, Any] = {"x": _SIDE, "y": 1 - 0.08 / height, "ha": "left", "va": "top"}
    style |= {"weight": "bold", "fontsize": SIZE, "parse_math": False, "in_layout": False}
    figure.suptitle("\n".join(lines), **style)
    if legend is not None:
        top = 1.0 if beside else 1 - (0.1 + len(lines) * LINE) / height
        place = {"loc": "upper right", "bbox_to_anchor": (1, top), "ncols": columns}
        figure.legend(*legend, frameon=False, fontsize=9, **place)
    return 1 - head / height
