"""Directories that are either whole or absent: written beside their place, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mor_jax.config import check

_DRAFT = ".partial-"


@contextlib.contextmanager
def fresh_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `path`; on leaving it is made durable and renamed to `path`.

    When the block raises, or the process is killed, `path` is as before; what was written lies in
    `.partial-NAME-PID` beside it at the most, and the next conversion to `path` removes it.
    replace: an existing directory gives way, once the new one is complete.

    Raises:
        ValueError: `path` exists and may not be replaced, or cannot be written.
    """
    target = check_target(path, replace=replace)
    draft = target.with_name(f"{_DRAFT}{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{_DRAFT}{target.name}-*"):
            if not _alive(left):
                shutil.rmtree(left)
        draft.mkdir()
    except OSError as error:
        raise ValueError(
            f"output={target}: cannot be written: {error}. Choose another directory"
        ) from error
    try:
        yield draft
        _settle(draft)
        _publish(draft, target)
    except OSError as error:
        raise ValueError(
            f"output={target}: writing failed: {error}. Nothing was left there; free space or "
            "choose another directory"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_target(path: str | os.PathLike[str], *, replace: bool = False) -> Path:
    """The absolute path of an output directory. Raises `ValueError` if it may not be written."""
    rule = "conversions write to local directories"
    check("://" not in str(path), "output", str(path), rule, "Write here and copy the result")
    target = Path(path).expanduser().resolve()
    rule = "exists and is a file"
    check(not target.is_file(), "output", str(target), rule, "Choose another directory")
    taken = target.is_dir() and any(target.iterdir())
    rule = "exists and is not empty"
    fix = "Choose another directory, or give --overwrite to replace it"
    check(replace or not taken, "output", str(target), rule, fix)
    there = next(part for part in (target.parent, *target.parents) if part.exists())
    rule = f"no permission to write in {there}, or it is read-only"
    writable = os.access(there, os.W_OK | os.X_OK, effective_ids=True)
    check(writable, "output", str(target), rule, "Choose another directory")
    return target


def _alive(draft: Path) -> bool:
    try:
        os.kill(int(draft.name.rpartition("-")[2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _settle(directory: Path) -> None:
    # A rename must not come before the bytes: after a power cut the name would promise them.
    # Some writers make files that nobody else may read.
    mode = directory.stat().st_mode & 0o666
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(mode)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _publish(draft: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f"{_DRAFT}{target.name}-replaced-{os.getpid()}")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old)
    else:
        draft.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
