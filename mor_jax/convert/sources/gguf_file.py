"""GGUF files: metadata, and tensors that are dequantized one at a time."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.convert.sources import gguf_header

_WHOLE = ("F32", "F16", "F64")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a GGUF file says besides its tensors. Values are decoded when asked for."""

    where: str
    fields: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file has none.

        kind: `int`, `float`, `str` or `bool`. Raises `ValueError` if the file has another.
        """
        if key not in self.fields:
            return default
        value = self._raw(key)
        ok = _is(value, kind)
        check(ok, f"{self.where}: {key}", _short(value), f"must be {_NAMES[kind]}", _AGAIN)
        return value

    def get_list(self, key: str, kind: type) -> Any:
        """The values of `key`, all of `kind`; None where the file has none.

        Raises `ValueError` if it has something else.
        """
        if key not in self.fields:
            return None
        values = self._raw(key)
        ok = isinstance(values, list) and all(_is(value, kind) for value in values)
        rule = f"must be a list, each {_NAMES[kind]}"
        check(ok, f"{self.where}: {key}", _short(values), rule, _AGAIN)
        return values

    def is_list(self, key: str) -> bool:
        """Whether the file has several values of `key`."""
        return key in self.fields and isinstance(self._raw(key), list)

    def check_present(self, key: str) -> None:
        """Raises `ValueError` if the file has no `key`."""
        check(key in self.fields, f"{self.where}: {key}", None, "is missing", _AGAIN)

    def _raw(self, key: str) -> Any:
        try:
            value = self.fields[key].contents()
        except UnicodeDecodeError as error:
            fail(f"{self.where}: {key}", None, f"is damaged ({error})", _AGAIN)
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


_AGAIN = "Copy or convert it again"


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _short(value: Any) -> Any:
    return value[:5] if isinstance(value, list | str) else value


def open_gguf(path: Path, architecture: str) -> tuple[LazyArrays, Metadata]:
    """Tensors by the file's own names, axes as NumPy has them (out x in), and its metadata.

    architecture: the only one that is read.

    Raises:
        ValueError: a damaged file or none, another architecture, one part of several, one written
            for big-endian machines, or a quantization that the library cannot undo.
    """
    kind = gguf_header.architecture(path)
    # Before the library decodes a large vocabulary for nothing.
    where, rule = f"{path}: general.architecture", f"only {architecture} is read"
    check(kind == architecture, where, kind, rule, f"Take a model of type {architecture}")
    gguf = require_package("gguf", "path", str(path))
    try:
        # Places that a damaged file tells may be too large to add up, which it finds out.
        with np.errstate(over="ignore"):
            reader = gguf.GGUFReader(path)
    # An altered file leads the library into errors of any kind.
    except Exception as error:
        rule = f"is damaged or no GGUF file ({str(error).strip() or type(error).__name__})"
        fail(str(path), f"{path.stat().st_size} bytes", rule, "Copy or download it again")
    fields = Metadata(str(path), reader.fields)
    parts = fields.get("split.count", int, 0)
    rule = "is one part of several"
    check(parts < 2, str(path), parts, rule, "Join them: llama-gguf-split --merge FIRST OUTPUT")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    undone = {kind: _can_undo(gguf, kind) for kind in {t.tensor_type for t in tensors.values()}}
    other = [f"{n} ({t.tensor_type.name})" for n, t in tensors.items() if not undone[t.tensor_type]]
    rule = "holds tensors whose quantization cannot be undone here"
    check(not other, str(path), other[:10], rule, "Take a file of another quantization")
    specs = {
        name: ArraySpec(
            tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name
        )
        for name, tensor in tensors.items()
    }

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        # Read rather than mapped: what is mapped stays with the process.
        raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
        rule = "the file was cut while it was read"
        check(raw.size == tensor.n_bytes, str(path), name, rule, "Copy it again")
        values = raw.view(tensor.data.dtype).reshape(tensor.data.shape)
        if tensor.tensor_type.name in _WHOLE:
            return np.asarray(values, np.float32)
        values = gguf.dequantize(values, tensor.tensor_type)
        return np.asarray(values, np.float32).reshape(specs[name].shape)

    return LazyArrays(str(path), specs, read), fields


def _can_undo(gguf: Any, kind: Any) -> bool:
    if kind.name in _WHOLE:
        return True
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
