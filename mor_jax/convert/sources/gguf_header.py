"""Validates the header of a GGUF file before the `gguf` library decodes it.

The library trusts every length and count, so that a damaged file can exhaust memory. Here they must
fit into the file. Only the name of the architecture is decoded.
"""

import mmap
import struct
from pathlib import Path

from mor_jax.config.parsing import fail

# Types of values: struct's letters of the scalar ones, then strings and arrays.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DEPTH, _MAX_AXES = 2, 8
_MAX_VALUES = 2**21
"""Most values in all arrays: twice those of the largest vocabularies."""


def architecture(path: Path) -> str | None:
    """The value of `general.architecture`, None if the file has none.

    Raises:
        ValueError: the file is damaged, not a GGUF file, or of another version or byte order.
    """
    size = path.stat().st_size
    if size < 24:
        _damaged(path, size, "it is shorter than a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _HeaderReader(path, data).architecture()


class _HeaderReader:
    # A cursor in the file, moved past one field after the other.
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._position, self._num_values = path, data, 0, 0

    def architecture(self) -> str | None:
        if self._take(4) != b"GGUF":
            self._fail("it does not begin with GGUF")
        self._check_version(self._number("I"))
        tensors, pairs = self._number("Q"), self._number("Q")
        if tensors * 24 + pairs * 13 > len(self._data):
            self._fail(f"it is too short for {tensors} tensors and {pairs} settings")
        name = None
        for _ in range(pairs):
            key, kind = self._string(), self._number("I")
            start = self._position
            self._skip(kind)
            if key == b"general.architecture" and kind == _STRING:
                name = self._data[start + 8 : self._position].decode("utf-8", errors="replace")
        for _ in range(tensors):
            self._string()
            axes = self._number("I")
            if axes > _MAX_AXES:
                self._fail(f"a tensor has {axes} axes")
            self._take(8 * axes + 12)
        return name

    def _check_version(self, version: int) -> None:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _VERSIONS:
            rule = "is written for big-endian machines"
            fail(str(self._path), swapped, rule, "Convert it: gguf-convert-endian FILE little")
        if version not in _VERSIONS:
            self._fail(f"its version is {version}; supported are {_VERSIONS}")

    def _skip(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALARS:
            self._take(struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            self._skip_array(depth)
        else:
            self._fail(f"it has a value of the unknown type {kind}")

    def _skip_array(self, depth: int) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._num_values += count
        if self._num_values > _MAX_VALUES:
            self._fail(f"its settings have more than {_MAX_VALUES} values")
        if kind in _SCALARS:
            self._take(count * struct.calcsize(_SCALARS[kind]))
            return
        for _ in range(count):
            self._skip(kind, depth + 1)

    def _string(self) -> bytes:
        return self._take(self._number("Q"))

    def _number(self, letter: str) -> int:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._data):
            self._fail(f"its header is truncated: it needs {size} bytes at {self._position}")
        chunk, self._position = self._data[self._position : end], end
        return chunk

    def _fail(self, reason: str) -> None:
        _damaged(self._path, len(self._data), reason)


def _damaged(path: Path, size: int, reason: str) -> None:
    fix = "Copy or download it again; for a Hugging Face directory use --from=hf"
    fail(str(path), f"{size} bytes", f"is damaged or not a GGUF file ({reason})", fix)


__all__ = ["architecture"]
