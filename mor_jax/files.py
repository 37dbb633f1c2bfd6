"""Files and directories on disk: atomic writes, new directories, JSON lines, locks, checksums.

If the process ends during a write, the target is absent, unchanged or complete, never half-written.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

Stamps = dict[str, list[int]]
"""Size in bytes and CRC-32 of files, by their path relative to a directory."""

DRAFT = ".draft"
"""Suffix of small files while `write_atomic` writes them."""

_BLOCK = 2**22
_SMALL = 2**20
_PARTIAL, _REPLACED = ".partial-", "replaced-"

# Unfinished drafts of this process, and directories that are being renamed to their target.
_open: set[Path] = set()
_renaming: set[Path] = set()


class LockHeld(Exception):
    """Another process holds the lock; the message names it where it is known."""


def write_atomic(path: epath.Path, content: str | bytes) -> None:
    """Writes a small file atomically: at any time it is absent, the old one or complete.

    On local disks the file is also durable (fsync) when this returns.
    """
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f"{path.name}{DRAFT}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            if "://" not in str(path):
                os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_file(path: Path, draft: Path | None = None) -> Iterator[Path]:
    """Yields a path next to `path` to write to; at the end that file replaces `path`.

    If the block raises, `path` is unchanged. draft: the path to use; default: an unused name.
    """
    draft = unused_path(path) if draft is None else draft
    _open.add(draft)
    try:
        yield draft
        fsync(draft)
        draft.replace(path)
    finally:
        _remove(draft)
        _open.discard(draft)


@contextlib.contextmanager
def fresh_directory(
    target: Path, check_replaced: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yields an empty directory next to `target`; at the end it is fsynced and renamed to `target`.

    If the block raises or the process is killed, `target` is unchanged; at most a directory
    `.partial-NAME-...` next to it is left, which `remove_stale_drafts` deletes.
    check_replaced: None: `target` must not exist or be empty. Otherwise it is called with the old
    directory, moved to another name, and raises if that must not be replaced.

    Raises:
        OSError: a file cannot be written or renamed.
        FileExistsError: another process created `target` in the meantime.
    """
    draft = target.with_name(draft_name(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft.mkdir()
    _open.add(draft)
    try:
        yield draft
        _make_durable(draft)
        _publish(draft, target, check_replaced)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _open.discard(draft)


def remove_drafts() -> bool:
    """Removes this process's unfinished drafts; for a signal handler that then ends the process.

    Returns False, and removes nothing, while a directory is being renamed to its target.
    """
    if _renaming:
        return False
    for draft in list(_open):
        # Other threads may still be writing to it.
        for _ in range(10):
            _remove(draft)
            if not draft.exists():
                break
    return True


def remove_stale_drafts(target: Path, check_replaced: Callable[[Path], None]) -> None:
    """Removes drafts of `target` that killed processes left, and restores a directory moved aside.

    check_replaced: as for `fresh_directory`; directories for which it raises are not deleted.
    """
    if not target.parent.is_dir():
        return
    # Match the whole name: `out` is also a prefix of `out-old`.
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"{re.escape(_PARTIAL + target.name)}-({_REPLACED})?{host}-(\d+)")
    for path in list(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        # Skip drafts of other hosts: whether their processes are alive is unknown.
        if match is None or _is_alive(int(match[2])):
            continue
        if match[1] is None:
            _remove(path)
        elif not target.exists():
            path.rename(target)
        else:
            with contextlib.suppress(ValueError):
                check_replaced(path)
                _remove(path)


def draft_name(target: Path, prefix: str = "") -> str:
    """Name of a draft of `target`; it contains the host name and the process id of its writer."""
    return f"{_PARTIAL}{target.name}-{prefix}{socket.gethostname()}-{os.getpid()}"


def unused_path(path: Path) -> Path:
    """A path next to `path`, with its suffix, that does not exist (random, unlike `NAME.draft`)."""
    return path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")


def fsync(path: Path) -> None:
    """Flushes a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _make_durable(directory: Path) -> None:
    # The bytes must reach the disk before the rename, or a power cut leaves a named, empty file.
    # Some writers create files that only their owner can read.
    mode = directory.stat().st_mode & 0o666
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(mode)
        fsync(path)


def _publish(draft: Path, target: Path, check_replaced: Callable[[Path], None] | None) -> None:
    old = target.with_name(draft_name(target, _REPLACED))
    _renaming.add(draft)
    try:
        if check_replaced is not None and target.exists():
            target.rename(old)
            # After the rename no process adds files to it by name, so this check is final.
            if any(old.iterdir()):
                check_replaced(old)
        try:
            draft.rename(target)
        except OSError as error:
            if not target.exists():
                raise
            raise FileExistsError(f"{target} was written by another process meanwhile") from error
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _renaming.discard(draft)
    fsync(target.parent)


def read_json_lines(path: epath.Path, *, torn: str = "last") -> Iterator[tuple[int, Any]]:
    """The values of a JSON Lines file, each with its line number from 1; empty lines are skipped.

    torn: which truncated lines of a killed process are skipped: `none`, the `last` one, or `any`
    (where later processes appended after a truncated line).

    Raises:
        ValueError: another line is not JSON, or the file holds bytes that are not UTF-8.
    """
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if torn == "any" or (torn == "last" and number == last):
                continue
            raise ValueError(f"{path}:{number}: is not JSON ({error}). Remove the line") from error
        yield number, value


def end_torn_line(path: epath.Path) -> None:
    """Adds a newline after a last line that a killed process truncated."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


@contextlib.contextmanager
def lock(file: Any, owner: str) -> Iterator[None]:
    """Holds a lock on an open local file while the block runs, and writes `owner` into it.

    file: opened with "a+", or the descriptor of a directory, to which nothing is written.

    Raises:
        LockHeld: another process holds it.
        OSError: the file system does not support locks.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockHeld(_owner(file)) from error
    if not isinstance(file, int):
        file.truncate(0)
        file.write(f"{owner}\n")
        file.flush()
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def lock_owner(path: Path) -> str:
    """The text that the holder of the lock on a local file wrote into it; "" if it is not locked.

    Raises:
        OSError: the file system does not support locks.
    """
    import fcntl

    if not path.is_file():
        return ""
    with path.open() as file:
        try:
            # Closing the file releases this shared lock at once.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _owner(file)
    return ""


def _owner(file: Any) -> str:
    if isinstance(file, int):
        return "another process"
    file.seek(0)
    return file.read().strip() or "another process"


def this_process() -> str:
    """`process PID on HOST`, the owner text of a lock."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def stamps(directory: Path, exclude: str) -> Stamps:
    """Size and CRC-32 of every file under `directory`, except `exclude`, which holds this list.

    Raises `OSError` where a file cannot be read.
    """
    return {name: stamp(path) for name, path in _entries(directory) if name != exclude}


def stamp(path: Path) -> list[int]:
    """Size and CRC-32 of a file. Raises `OSError` where it cannot be read."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def added_or_changed(
    directory: Path, recorded: Mapping[str, Any], exclude: str, *, quick: bool = False
) -> list[str]:
    """Files under `directory` that differ from `recorded`, such as "notes.txt (added)".

    recorded: a result of `stamps`, or names with None where no checksum was recorded. Files that
    were deleted since are not listed. quick: compare files larger than 1 MiB by size alone.
    """
    differing = []
    for name, path in _entries(directory):
        if name == exclude:
            continue
        if name not in recorded or path.is_symlink() or path.is_dir():
            differing.append(f"{name} (added)")
        elif recorded[name] is not None and not _matches(path, recorded[name], quick):
            differing.append(f"{name} (changed)")
    return differing


def _matches(path: Path, expected: list[int], quick: bool) -> bool:
    size = path.stat().st_size
    if size != expected[0]:
        return False
    return (quick and size > _SMALL) or stamp(path) == expected


def _entries(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every file, link and empty directory; links are not followed."""
    for folder_name, folders, files in os.walk(directory):
        folder = Path(folder_name)
        links = [name for name in folders if (folder / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (folder / name).relative_to(directory).as_posix(), folder / name
        if not files and not folders and folder != directory:
            yield folder.relative_to(directory).as_posix(), folder
