"""The list of files that every conversion leaves beside them: what `--overwrite` may replace."""

import json
from pathlib import Path
from typing import Any

from mor_jax import files
from mor_jax.config.parsing import check

MARKER = "conversion.json"

_ABOUT = "files that mor_jax made here, with size and CRC-32; --overwrite replaces no others"


def write_marker(directory: Path) -> None:
    """Lists all files under `directory`. Raises `OSError` where that cannot be."""
    told = {"about": _ABOUT, "files": files.stamps(directory, MARKER)}
    (directory / MARKER).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def check_ours(directory: Path, shown: Path, name: str, *, quick: bool = False) -> None:
    """Raises `ValueError` unless all that lies in `directory` is as a conversion made it.

    shown, name: the directory and the setting that names it, for messages. quick: large files are
    compared by size alone.
    """
    made = _listed(directory)
    rule = f"has no {MARKER}, the list of what a conversion made (earlier releases left none)"
    fix = "If nothing in it is needed, delete it yourself; else choose another directory"
    check(made is not None, name, str(shown), rule, fix)
    found = files.added_or_changed(directory, made or {}, MARKER, quick=quick)
    more = f" and {len(found) - 10} more" if len(found) > 10 else ""
    rule = f"holds what no conversion made: {', '.join(found[:10])}{more}"
    fix = "Move that elsewhere, or choose another directory"
    check(not found, name, str(shown), rule, fix)


def renew(directory: Path, name: str) -> bytes | None:
    """The list with `name` as it is now; None where there is no list to renew."""
    made = _listed(directory)
    if made is None:
        return None
    told = {"about": _ABOUT, "files": made | {name: files.stamp(directory / name)}}
    return (json.dumps(told, indent=1) + "\n").encode()


def _listed(directory: Path) -> files.Stamps | None:
    try:
        told: Any = json.loads((directory / MARKER).read_bytes())
        made = told["files"]
        whole = all(
            type(size) is int and type(crc) is int for size, crc in made.values()
        ) and isinstance(made, dict)
    # Missing, cut short, or another program's file of this name.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return made if whole else None
