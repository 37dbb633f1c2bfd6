"""Plot of an evaluation: loss by depth and by position in the sequence."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.evaluation.report import NAMES
from mor_jax.files import new_file
from mor_jax.plotting import titles

# Marks our own files in their metadata; the field depends on the format.
_CREATOR = "mor_jax evaluation"
_METADATA_FIELD = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
_COLOURS = {"causal": "#c2410c", "topk": "#1d4ed8"}


def draw(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG, SVG or PDF. values: as from `Evaluation.to_dict`.

    Raises `ValueError` for another file type, or if the file cannot be written.
    """
    from matplotlib.figure import Figure

    check_path(path)
    depths = [group for group in values.get("by_depth", ()) if group["targets_causal"]]
    figure = Figure(figsize=(10, 4) if depths else (6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if depths else 1, squeeze=False)[0]
    modes = [mode for mode in NAMES if f"loss_{mode}" in values]
    for mode in modes:
        label = f"{NAMES[mode]} routing" if depths else "loss"
        style = {"marker": "o", "color": _COLOURS[mode], "label": label}
        groups = [g for g in values["by_position"] if g[f"targets_{mode}"]]
        places = [1 + (g["first"] + g["last"]) / 2 for g in groups]
        axes[0].plot(places, [g[f"loss_{mode}"] for g in groups], **style)
        if depths:
            shown = [g for g in values["by_depth"] if g[f"targets_{mode}"]]
            losses = [g[f"loss_{mode}"] for g in shown]
            axes[1].plot([g["depth"] for g in shown], losses, **style)
    axes[0].set(
        xscale="log", xlabel="position in the sequence, from 1", ylabel="loss, nats per token"
    )
    axes[0].set_title("Loss by position")
    if depths:
        axes[1].set(xlabel="recursions of the predicting token", ylabel="loss, nats per token")
        axes[1].set_title("Loss by depth")
        axes[1].set_xticks(range(len(values["by_depth"])))
        axes[0].legend()
    for one in axes:
        one.grid(alpha=0.3)
    title = f"{Path(values['workdir']).name}, step {values['step']}: {values['text']}"
    lines = titles.wrapped(title, 0.96 * figure.get_size_inches()[0], titles.SIZE)
    figure.suptitle("\n".join(lines), fontsize=titles.SIZE, parse_math=False)
    try:
        # Written to a temporary file first: a full disk would leave an unreadable plot.
        with new_file(Path(path)) as draft:
            figure.savefig(draft, dpi=150, metadata={_METADATA_FIELD[draft.suffix]: _CREATOR})
    except OSError as error:
        fail("figure", str(path), f"cannot be written ({error})", "Choose another --figure")


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` unless a plot can be written to `path`."""
    where = Path(path)
    rule = "must end in .png, .svg or .pdf"
    check(where.suffix in (".png", ".svg", ".pdf"), "figure", str(path), rule, "Try loss.png")
    rule = "its directory does not exist"
    check(where.parent.is_dir(), "figure", str(path), rule, "Create it first")
    ours = not where.exists() or (where.is_file() and _CREATOR.encode() in where.read_bytes())
    rule = "exists and is not the plot of an evaluation, so it is not replaced"
    check(ours, "figure", str(path), rule, "Choose another --figure")
