"""The head of a GGUF file walked through once, before the library that decodes it believes it.

The library takes every length and count as it stands: a damaged one lets it grow without end. Here
they have to fit into the file. Nothing is decoded but the name of the architecture.
"""

import mmap
import struct
from pathlib import Path

from mor_jax.config.parsing import fail

# Kinds of values: struct's letter of the plain ones, then texts and arrays.
_PLAIN = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEPTH, _AXES = 2, 8
_MOST = 2**21
"""Values in arrays: twice those of the largest vocabularies, and about as many as memory takes."""


def architecture(path: Path) -> str | None:
    """What `general.architecture` says, None where nothing does.

    Raises:
        ValueError: the file is damaged, none of GGUF, or of another version or byte order.
    """
    size = path.stat().st_size
    if size < 24:
        _damaged(path, size, "it lacks its beginning")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Walk(path, data).architecture()


class _Walk:
    # A place in the file that moves over one thing after the other.
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at, self._values = path, data, 0, 0

    def architecture(self) -> str | None:
        if self._take(4) != b"GGUF":
            self._fail("it does not begin with GGUF")
        self._check_version(self._number("I"))
        tensors, pairs = self._number("Q"), self._number("Q")
        if tensors * 24 + pairs * 13 > len(self._data):
            self._fail(f"{tensors} tensors and {pairs} settings have no room in it")
        found = None
        for _ in range(pairs):
            key, kind = self._text(), self._number("I")
            start = self._at
            self._skip(kind)
            if key == b"general.architecture" and kind == _TEXT:
                found = self._data[start + 8 : self._at].decode("utf-8", errors="replace")
        for _ in range(tensors):
            self._text()
            axes = self._number("I")
            if axes > _AXES:
                self._fail(f"a tensor has {axes} axes")
            self._take(8 * axes + 12)
        return found

    def _check_version(self, version: int) -> None:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _VERSIONS:
            rule = "is written for big-endian machines"
            fail(str(self._path), swapped, rule, "Convert it: gguf-convert-endian FILE little")
        if version not in _VERSIONS:
            self._fail(f"it says to be of version {version}; {_VERSIONS} are read")

    def _skip(self, kind: int, depth: int = 0) -> None:
        if kind in _PLAIN:
            self._take(struct.calcsize(_PLAIN[kind]))
        elif kind == _TEXT:
            self._text()
        elif kind == _ARRAY and depth < _DEPTH:
            self._skip_array(depth)
        else:
            self._fail(f"it has a value of the unknown kind {kind}")

    def _skip_array(self, depth: int) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._values += count
        if self._values > _MOST:
            self._fail(f"its settings hold more than {_MOST} values")
        if kind in _PLAIN:
            self._take(count * struct.calcsize(_PLAIN[kind]))
            return
        for _ in range(count):
            self._skip(kind, depth + 1)

    def _text(self) -> bytes:
        return self._take(self._number("Q"))

    def _number(self, letter: str) -> int:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            self._fail(f"it ends before its head does, which wants {size} bytes at {self._at}")
        taken, self._at = self._data[self._at : end], end
        return taken

    def _fail(self, reason: str) -> None:
        _damaged(self._path, len(self._data), reason)


def _damaged(path: Path, size: int, reason: str) -> None:
    fix = "Copy or download it again; of other formats, directories of Hugging Face are --from=hf"
    fail(str(path), f"{size} bytes", f"is damaged or no GGUF file ({reason})", fix)


__all__ = ["architecture"]
