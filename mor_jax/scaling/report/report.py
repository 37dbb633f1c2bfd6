"""The report of a study: figures as PNG files and one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mor_jax.config.parsing import check
from mor_jax.files import write_atomic
from mor_jax.scaling.fit.fit import Fit, View
from mor_jax.scaling.report.figures import Figures
from mor_jax.scaling.report.page import OPENING, Picture, page
from mor_jax.scaling.runs.points import Point

PAGE = "report.html"

# The first view has all figures. Another parameter count changes only sizes, another routing only
# losses.
_DRAWN = {
    ("causal", "unique"): ("by_budget", "frontier", "optimum", "by_architecture"),
    ("causal", "effective"): ("optimum",),
    ("topk", "unique"): ("by_budget", "frontier"),
    ("topk", "effective"): ("optimum",),
}
_FILES = {
    "by_budget": "curves",
    "by_architecture": "architectures",
    "frontier": "frontier",
    "optimum": "optimum",
}


def write_report(
    fit: Fit, points: Sequence[Point], manifest: Mapping[str, Any], folder: epath.Path
) -> list[epath.Path]:
    """Writes figures and page into `folder` and returns their paths, the page first.

    points: those of the fit. manifest: plain values with `study`, `unit`, `code` and `runs`,
    printed as they are. Every file is written atomically.

    Raises `ValueError` if files of these names exist that no report wrote.
    """
    _check_free(fit, folder)
    folder.mkdir(parents=True, exist_ok=True)
    unit = str(manifest.get("unit", "training"))
    pictures: dict[tuple[str, str], list[Picture]] = {}
    paths = []
    for view in fit.views:
        drawn = _draw(fit, view, unit, _DRAWN[view.routing, view.kind])
        pictures[view.routing, view.kind] = drawn
        for picture in drawn:
            write_atomic(folder / picture.file, picture.png)
            paths.append(folder / picture.file)
    write_atomic(folder / PAGE, page(fit, points, manifest, pictures))
    return [folder / PAGE, *paths]


def _check_free(fit: Fit, folder: epath.Path) -> None:
    names = [
        _file(name, view) for view in fit.views for name in _DRAWN[view.routing, view.kind]
    ] + [PAGE]
    existing = [name for name in names if (folder / name).exists()]
    ours = (folder / PAGE).exists() and OPENING.encode() in (folder / PAGE).read_bytes()
    rule = f"holds {', '.join(existing[:5])}, which no report made, and would replace"
    check(ours or not existing, "output", str(folder), rule, "Give another --output")


def _file(name: str, view: View) -> str:
    return f"{_FILES[name]}-{view.routing}-{view.kind}.png"


def _draw(fit: Fit, view: View, unit: str, names: Sequence[str]) -> list[Picture]:
    figures = Figures(fit, view, unit)
    return [Picture(name, _file(name, view), getattr(figures, name)()) for name in names]


__all__ = ["PAGE", "write_report"]
