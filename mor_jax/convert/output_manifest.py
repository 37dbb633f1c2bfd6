"""The manifest of a conversion's output: the files that `--overwrite` may replace."""

import json
from pathlib import Path
from typing import Any

from mor_jax import files
from mor_jax.config.parsing import check

MANIFEST = "conversion.json"

_ABOUT = "files that mor_jax wrote here, with size and CRC-32; --overwrite replaces only these"


def write_manifest(directory: Path) -> None:
    """Writes the manifest of all files under `directory`. Raises `OSError` if that fails."""
    manifest = {"about": _ABOUT, "files": files.stamps(directory, MANIFEST)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check_unmodified(directory: Path, shown: Path, name: str, *, quick: bool = False) -> None:
    """Raises `ValueError` unless `directory` contains exactly what a conversion wrote.

    shown, name: the directory and its setting, for messages. quick: compares large files by size
    only.
    """
    listed = _read(directory)
    rule = f"has no {MANIFEST}, the list of a conversion's files (early releases wrote none)"
    fix = "Delete it yourself if you need nothing in it, or choose another directory"
    check(listed is not None, name, str(shown), rule, fix)
    others = files.added_or_changed(directory, listed or {}, MANIFEST, quick=quick)
    more = f" and {len(others) - 10} more" if len(others) > 10 else ""
    rule = f"contains files that no conversion made: {', '.join(others[:10])}{more}"
    fix = "Move them elsewhere, or choose another directory"
    check(not others, name, str(shown), rule, fix)


def updated_manifest(directory: Path, name: str) -> bytes | None:
    """The manifest with the current stamp of `name`; None if the directory has no manifest."""
    listed = _read(directory)
    if listed is None:
        return None
    manifest = {"about": _ABOUT, "files": listed | {name: files.stamp(directory / name)}}
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _read(directory: Path) -> files.Stamps | None:
    try:
        manifest: Any = json.loads((directory / MANIFEST).read_bytes())
        listed = manifest["files"]
        valid = all(
            type(size) is int and type(crc) is int for size, crc in listed.values()
        ) and isinstance(listed, dict)
    # Missing, truncated, or another program's file of this name.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return listed if valid else None
