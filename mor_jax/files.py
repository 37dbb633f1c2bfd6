"""The files that a command made in a directory: their list, so that it replaces no others.

A directory that is replaced whole takes with it whatever lies in it. Commands that do so keep the
list beside their files, and ask here what is not in it before they replace anything.
"""

import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

Stamps = dict[str, list[int]]
"""Size in bytes and CRC-32 of files, by their path inside of a directory."""

_BLOCK = 2**22
_SMALL = 2**20


def write_atomic(path: epath.Path, text: str) -> None:
    """Writes a small text file that is either absent, the old one or complete.

    On local disks it is also durable when this returns: it outlives the machine's power.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            if "://" not in str(path):
                os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


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


def unused(path: Path) -> Path:
    """A name beside `path`, with its ending, that nobody has: `NAME.draft` may be anybody's."""
    return path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")


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


__all__ = ["Stamps", "stamp", "stamps", "strangers", "unused", "write_atomic"]
