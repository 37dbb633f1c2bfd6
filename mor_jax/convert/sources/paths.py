"""Checks of paths, before they reach the file system."""

import os
from pathlib import Path

from mor_jax.config.parsing import check

PathLike = str | os.PathLike[str]

_NAME_BYTES, _PATH_BYTES = 255, 4095


def check_path(name: str, path: PathLike) -> None:
    """Raises `ValueError` unless `path` is a possible path. name: of the setting."""
    text = os.fspath(path)
    check(text != "", name, text, "is empty", "Give a path")
    check("\0" not in text, name, text, "contains a zero byte", "Check the path")
    longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    ok = longest <= _NAME_BYTES and len(os.fsencode(text)) <= _PATH_BYTES
    rule = f"is too long: at most {_NAME_BYTES} bytes per name, {_PATH_BYTES} in total"
    shown = text if len(text) < 100 else f"{text[:40]}...{text[-40:]}"
    check(ok, name, shown, rule, "Choose a shorter one")
