"""Files and directories on disk: atomic writes, fresh directories, JSON lines, locks, file lists.

What is written here is absent, as before, or complete, whenever the process ends.
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
"""Size in bytes and CRC-32 of files, by their path inside of a directory."""

DRAFT = ".draft"
"""Ending of small files while `write_atomic` writes them."""

_BLOCK = 2**22
_SMALL = 2**20
_PARTIAL, _REPLACED = ".partial-", "replaced-"

# Drafts of this process; directories that are being renamed to their place.
_open: set[Path] = set()
_renaming: set[Path] = set()


class LockHeld(Exception):
    """Another process holds the lock; the text says which, as far as it can be told."""


def write_atomic(path: epath.Path, content: str | bytes) -> None:
    """Writes a small file that is either absent, the old one or complete.

    On local disks it is also durable when this returns: it outlives the machine's power.
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
    """Yields a path beside `path` to write to; on leaving, that file takes the place of `path`.

    When the block raises, `path` is as before. draft: the path to use; default: an unused name.
    """
    draft = unused(path) if draft is None else draft
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
    """Yields an empty directory beside `target`; on leaving it is made durable and renamed to it.

    When the block raises, or the process is killed, `target` is as before; what was written lies in
    `.partial-NAME-...` beside it at the most, which `remove_stale_drafts` takes away.
    check_replaced: None: nothing may be there (an empty directory may). Else it is called with what
    is there, set aside under another name, and raises where that may not be replaced.

    Raises:
        OSError: something cannot be written or renamed.
        FileExistsError: `target` appeared meanwhile.
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
    """Removes what this process has not finished, for a signal's handler that ends it next.

    False: a directory is being renamed to its place right now; let it be finished.
    """
    if _renaming:
        return False
    for draft in list(_open):
        # Threads may write there still.
        for _ in range(10):
            _remove(draft)
            if not draft.exists():
                break
    return True


def remove_stale_drafts(target: Path, check_replaced: Callable[[Path], None]) -> None:
    """Removes what killed processes left beside `target`, and puts back what one had set aside.

    check_replaced: as of `fresh_directory`; what it refuses is somebody's, and stays.
    """
    if not target.parent.is_dir():
        return
    # Nothing but the whole name will do: `out` is also the beginning of `out-old`.
    host = re.escape(socket.gethostname())
    named = re.compile(rf"{re.escape(_PARTIAL + target.name)}-({_REPLACED})?{host}-(\d+)")
    for path in list(target.parent.iterdir()):
        found = named.fullmatch(path.name)
        # Drafts of other hosts stay: their processes cannot be seen from here.
        if found is None or _is_alive(int(found[2])):
            continue
        if found[1] is None:
            _remove(path)
        elif not target.exists():
            path.rename(target)
        else:
            with contextlib.suppress(ValueError):
                check_replaced(path)
                _remove(path)


def draft_name(target: Path, what: str = "") -> str:
    """Name of a draft of `target`: it says which process of which host writes it."""
    return f"{_PARTIAL}{target.name}-{what}{socket.gethostname()}-{os.getpid()}"


def unused(path: Path) -> Path:
    """A name beside `path`, with its ending, that nobody has: `NAME.draft` may be anybody's."""
    return path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")


def fsync(path: Path) -> None:
    """Waits until a file or directory is on the disk as it stands."""
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
    # A rename must not come before the bytes: after a power cut the name would promise them.
    # Some writers make files that nobody else may read.
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
            # Nobody adds to it by its name any more: what is found now is all there is.
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
    """The values of a file of JSON lines, each with its line number from 1; empty lines are none.

    torn: which lines a killed process may have cut short, and are left out: `none`, the `last` one,
    or `any` (where later processes went on behind a cut line).

    Raises:
        ValueError: another line is not JSON, or the file holds bytes that are no text.
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
    """Ends a last line that a killed process cut short, so that the next one begins a new line."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


@contextlib.contextmanager
def lock(file: Any, owner: str) -> Iterator[None]:
    """Holds a lock on an open local file while the block runs, and writes `owner` into it.

    file: opened with "a+", or the descriptor of a directory, into which nothing is written.

    Raises:
        LockHeld: another process has it.
        OSError: the file system knows no locks.
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
    """What the holder of the lock on a local file wrote into it, or "" where nobody holds it.

    Raises:
        OSError: the file system knows no locks.
    """
    import fcntl

    if not path.is_file():
        return ""
    with path.open() as file:
        try:
            # Let go of at once, with the file.
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
    """Process and host, for the holder of a lock."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def stamps(directory: Path, but: str) -> Stamps:
    """Of every file under `directory`, except the one named `but`, which holds the list.

    Raises `OSError` where a file cannot be read.
    """
    return {name: stamp(path) for name, path in _entries(directory) if name != but}


def stamp(path: Path) -> list[int]:
    """Size and CRC-32 of a file. Raises `OSError` where it cannot be read."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def strangers(
    directory: Path, made: Mapping[str, Any], but: str, *, quick: bool = False
) -> list[str]:
    """What lies under `directory` and is not as `made` lists it: "notes.txt (added)".

    made: what `stamps` gave, or names with None where no sums were kept. Files that have gone since
    are not named: nobody loses them. quick: files of more than 1 MiB are compared by size alone.
    """
    found = []
    for name, path in _entries(directory):
        if name == but:
            continue
        if name not in made or path.is_symlink() or path.is_dir():
            found.append(f"{name} (added)")
        elif made[name] is not None and not _same(path, made[name], quick):
            found.append(f"{name} (changed)")
    return found


def _same(path: Path, wanted: list[int], quick: bool) -> bool:
    size = path.stat().st_size
    if size != wanted[0]:
        return False
    return (quick and size > _SMALL) or stamp(path) == wanted


def _entries(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every file, link and empty directory; links are not followed."""
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (here / name).relative_to(directory).as_posix(), here / name
        if not files and not folders and here != directory:
            yield here.relative_to(directory).as_posix(), here
