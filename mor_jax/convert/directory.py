"""Directories and files that are either whole or as before: written beside, then renamed."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from mor_jax.config.parsing import check
from mor_jax.convert.marker import MARKER, check_ours, write_marker
from mor_jax.convert.sources.paths import PathLike, check_path

_DRAFT, _REPLACED = ".partial-", "replaced-"

# Drafts of this process; those that are being renamed to their place.
_open: set[Path] = set()
_renaming: set[Path] = set()


@contextlib.contextmanager
def fresh_directory(
    path: PathLike,
    *,
    replace: bool = False,
    sources: Sequence[PathLike] = (),
    name: str = "output",
) -> Iterator[Path]:
    """Yields an empty directory beside `path`; on leaving it is made durable and renamed to `path`.

    When the block raises, or the process is killed, `path` is as before; what was written lies in
    `.partial-NAME-...` beside it at the most, and the next conversion to `path` removes it.
    replace: what an earlier conversion made there gives way, once the new one is complete; not
    what is one of `sources`, or in the way of one, and nothing that was added or changed since.
    name: of the setting that `path` is, for messages.

    Raises:
        ValueError: `path` exists and may not be replaced, or cannot be written.
    """
    check_path(name, path)
    _tidy(absolute(path))
    target = check_target(path, replace=replace, sources=sources, name=name)
    draft = target.with_name(_name(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise ValueError(
            f"{name}={target}: cannot be written: {error}. Choose another directory"
        ) from error
    _open.add(draft)
    try:
        yield draft
        write_marker(draft)
        _settle(draft)
        _publish(draft, target, replace, name)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name}={target}: writing failed: {error}. Nothing was left there; free space or "
            "choose another directory"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _open.discard(draft)


def replace_file(target: Path, contents: bytes) -> None:
    """Writes a file that is the old one, if there was one, or the new one at any time.

    Raises:
        ValueError: it cannot be written; what was there is there.
    """
    _tidy(target)
    draft = target.with_name(_name(target))
    _open.add(draft)
    try:
        draft.write_bytes(contents)
        if target.exists():
            draft.chmod(target.stat().st_mode & 0o777)
        flush(draft)
        draft.replace(target)
        flush(target.parent)
    except OSError as error:
        raise ValueError(
            f"output={target}: cannot be written: {error}. Free space, or copy the directory to "
            "where it may be written"
        ) from error
    finally:
        _remove(draft)
        _open.discard(draft)


def abandon() -> bool:
    """Takes away what this process has begun, for a signal's handler that ends it next.

    False: something is being renamed to its place right now; let it be finished.
    """
    if _renaming:
        return False
    for draft in _open:
        # Threads may write there still.
        for _ in range(10):
            _remove(draft)
            if not draft.exists():
                break
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def check_target(
    path: PathLike,
    *,
    replace: bool = False,
    sources: Sequence[PathLike] = (),
    name: str = "output",
) -> Path:
    """The absolute path of an output directory. Raises `ValueError` if it may not be written."""
    check_path(name, path)
    rule = "conversions write to local directories"
    check("://" not in str(path), name, str(path), rule, "Write here and copy the result")
    target = absolute(path)
    taken = os.path.lexists(target) and not target.is_dir()
    check(not taken, name, str(target), "exists and is a file", "Choose another directory")
    if target.is_dir() and any(target.iterdir()):
        rule = "exists and is not empty"
        listed = (target / MARKER).is_file()
        or_so = ", or give --overwrite to replace what a conversion made" if listed else ""
        fix = f"Choose another directory{or_so}"
        check(replace, name, str(target), rule, fix)
        _check_replaceable(target, [absolute(source) for source in sources], name)
    there = next(part for part in (target.parent, *target.parents) if part.exists())
    check(there.is_dir(), name, str(target), f"{there} is a file", "Choose another directory")
    rule = f"no permission to write in {there}, or it is read-only"
    writable = os.access(there, os.W_OK | os.X_OK, effective_ids=True)
    check(writable, name, str(target), rule, "Choose another directory")
    return target


def _check_replaceable(target: Path, sources: Sequence[Path], name: str) -> None:
    # Names that are no paths (of the hub, `bytes`) cannot be in the way.
    for source in filter(Path.exists, sources):
        rule = f"is {source}, which is read, or lies around or inside of it"
        apart = target != source and target not in source.parents and source not in target.parents
        check(apart, name, str(target), rule, "Choose another directory")
    rule = "holds the checkpoints of a run, which are not replaced"
    fix = "Choose another directory, or delete this one yourself"
    check(not (target / "checkpoints").exists(), name, str(target), rule, fix)
    check_ours(target, target, name, quick=True)


def absolute(path: PathLike) -> Path:
    """The path from the root, without links; `~` is the home directory."""
    return Path(os.path.expanduser(path)).resolve()


def _name(target: Path, what: str = "") -> str:
    return f"{_DRAFT}{target.name}-{what}{socket.gethostname()}-{os.getpid()}"


def _tidy(target: Path) -> None:
    """Takes away what killed conversions to `target` left, and puts back what one had replaced."""
    if not target.parent.is_dir():
        return
    # Nothing but the whole name will do: `out` is also the beginning of `out-old`.
    host = re.escape(socket.gethostname())
    named = re.compile(rf"{re.escape(_DRAFT + target.name)}-({_REPLACED})?{host}-(\d+)")
    for path in list(target.parent.iterdir()):
        found = named.fullmatch(path.name)
        # Drafts of other hosts stay: their processes cannot be seen from here.
        if found is None or _lives(int(found[2])):
            continue
        if found[1] is None:
            _remove(path)
        elif not target.exists():
            path.rename(target)
        else:
            # What was set aside and is not as it was made is somebody's; it stays there.
            with contextlib.suppress(ValueError):
                check_ours(path, target, "output")
                _remove(path)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
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
        flush(path)


def flush(path: Path) -> None:
    """Waits until a file or directory is on the disk as it stands."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(draft: Path, target: Path, replace: bool, name: str) -> None:
    old = target.with_name(_name(target, _REPLACED))
    _renaming.add(draft)
    try:
        if replace and target.exists():
            target.rename(old)
            # Nobody adds to it by its name any more: what is found now is all there is.
            if any(old.iterdir()):
                check_ours(old, target, name)
        try:
            draft.rename(target)
        except OSError as error:
            if not target.exists():
                raise
            told = "was written by another conversion meanwhile. Choose another directory"
            raise ValueError(f"{name}={target}: {told}") from error
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _renaming.discard(draft)
    flush(target.parent)
