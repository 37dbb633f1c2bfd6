"""Texts that are to be paths, looked at before the system is asked about them."""

import os
from pathlib import Path

from mor_jax.config.parsing import check

PathLike = str | os.PathLike[str]

_NAME, _PATH = 255, 4095


def check_path(name: str, path: PathLike) -> None:
    """Raises `ValueError` unless `path` can be one. name: of the setting."""
    text = os.fspath(path)
    check(text != "", name, text, "is empty", "Give a path")
    check("\0" not in text, name, text, "holds a zero byte, which no path has", "Check the path")
    longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    ok = longest <= _NAME and len(os.fsencode(text)) <= _PATH
    rule = f"is too long for a path: {_NAME} bytes a name, {_PATH} in all"
    shown = text if len(text) < 100 else f"{text[:40]}...{text[-40:]}"
    check(ok, name, shown, rule, "Choose a shorter one")
