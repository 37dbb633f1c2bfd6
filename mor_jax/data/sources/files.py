"""The files of a source: matched by a pattern, on disk or in an object store, and opened."""

import dataclasses
import functools
import glob
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.data.sources import compressed, object_store
from mor_jax.data.sources.directories import advice


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source.

    name: its name in errors. relative: its path below the folder that the pattern names. size:
    bytes. stream: opens it for sequential reading; random: for random access. Both give the bytes
    as stored and raise `OSError`.
    """

    name: str
    relative: str
    size: int
    stream: Callable[[], Any]
    random: Callable[[], Any]


def local_file(path: Path, root: Path) -> File:
    """The file at `path`, named relative to `root`."""
    opened = functools.partial(open, path, "rb")
    return File(str(path), os.path.relpath(path, root), os.path.getsize(path), opened, opened)


def matching(pattern: str, setting: str, spec: str) -> list[File]:
    """The files that a pattern matches, sorted by the parts of their paths.

    `*`, `?` and `[...]` stand for characters of one name that does not begin with a dot, `**` for
    folders at any depth. Raises `ValueError` if none matches or an object store denies access.
    """
    if pattern.startswith(object_store.SCHEME):
        return _stored(pattern, setting, spec)
    rule = "is neither a path nor an address that begins with gs://"
    fix = "Copy the files to a local path or to gs:// first; write paths without 'file://'"
    check("://" not in pattern, setting, spec, rule, fix)
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        inside = {name: 0 for name in _below(pattern)}
        fail(setting, spec, *advice(pattern, sorted(inside), spec.partition(":")[0]))
    # A file name may itself contain brackets.
    names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = [path for path in sorted(Path(name) for name in names) if path.is_file()]
    rule = f"matches no file (current directory: {os.getcwd()})"
    check(bool(files), setting, spec, rule, _unmatched(pattern))
    root = Path(os.path.dirname(_fixed(pattern)) or ".")
    return [local_file(path, root) for path in files]


def _fixed(pattern: str) -> str:
    return pattern.split("*")[0].split("?")[0].split("[")[0]


def _unmatched(pattern: str) -> str:
    if "{" in pattern:
        return "Braces are not expanded: give one source per alternative"
    return "Check the path; ** matches folders at any depth"


def _below(folder: str) -> Iterator[str]:
    for inside, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.relpath(os.path.join(inside, name), folder) for name in names)


def _stored(pattern: str, setting: str, spec: str) -> list[File]:
    bucket = object_store.Bucket(pattern, setting, spec)
    root = os.path.dirname(_fixed(bucket.path))
    exact = bucket.path.rstrip("/")
    literal = exact == _fixed(exact)
    below = exact.removeprefix(root).lstrip("/")
    sizes = bucket.sizes(exact if literal else root, literal or "/" in below or "**" in below)
    if literal and sizes and exact not in sizes:
        inside = sorted(os.path.relpath(path, exact) for path in sizes)
        fail(setting, spec, *advice(bucket.address(exact), inside, spec.partition(":")[0]))
    parts = exact.split("/")
    paths = [path for path in sizes if path == exact or matches(path.split("/"), parts)]
    check(bool(paths), setting, spec, "matches no file in the bucket", _unmatched(exact))
    return [
        File(
            bucket.address(path),
            os.path.relpath(path, root or "."),
            sizes[path],
            functools.partial(bucket.stream, path),
            functools.partial(bucket.random, path),
        )
        for path in sorted(paths, key=lambda path: path.split("/"))
    ]


def matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a file's path matches a pattern as `glob.glob` would, both split into parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        # Any number of folders, none of them hidden; at the end of a pattern the file as well.
        if len(pattern) == 1:
            return bool(parts) and not any(part.startswith(".") for part in parts)
        hidden = next((i for i, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(matches(parts[skipped:], pattern[1:]) for skipped in range(hidden + 1))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def lines(file: File) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, from 1, decompressed, with their line ends.

    Raises `ValueError` that names the line if the file is unreadable, damaged or truncated.
    """
    number = -1
    try:
        with compressed.decompressed(file.stream()) as stream:
            number = 0
            for number, line in enumerate(stream, 1):
                yield number, line
    except OSError as error:
        # Before the first line only the file can be named.
        where = file.name if number < 0 else f"{file.name}:{number + 1}"
        why = object_store.reason(error)
        fix = "Check its permissions and that it is complete"
        fail("file", where, f"cannot be read ({why})", fix)
