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

_UNQUANTIZED = ("F32", "F16", "F64")
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a GGUF file. Values are decoded on access."""

    where: str
    fields: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default` if the file has none.

        kind: `int`, `float`, `str` or `bool`. Raises `ValueError` for a value of another type.
        """
        if key not in self.fields:
            return default
        value = self._raw(key)
        ok = _has_type(value, kind)
        check(
            ok,
            f"{self.where}: {key}",
            _shortened(value),
            f"must be {_TYPE_NAMES[kind]}",
            _COPY_AGAIN,
        )
        return value

    def get_list(self, key: str, kind: type) -> Any:
        """The list `key`, all of type `kind`; None if the file has none.

        Raises `ValueError` for anything else.
        """
        if key not in self.fields:
            return None
        values = self._raw(key)
        ok = isinstance(values, list) and all(_has_type(value, kind) for value in values)
        rule = f"must be a list, each {_TYPE_NAMES[kind]}"
        check(ok, f"{self.where}: {key}", _shortened(values), rule, _COPY_AGAIN)
        return values

    def is_list(self, key: str) -> bool:
        """Whether the value of `key` is a list."""
        return key in self.fields and isinstance(self._raw(key), list)

    def check_present(self, key: str) -> None:
        """Raises `ValueError` if the file has no `key`."""
        check(key in self.fields, f"{self.where}: {key}", None, "is missing", _COPY_AGAIN)

    def _raw(self, key: str) -> Any:
        try:
            value = self.fields[key].contents()
        except UnicodeDecodeError as error:
            fail(f"{self.where}: {key}", None, f"is damaged ({error})", _COPY_AGAIN)
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


_COPY_AGAIN = "Copy or convert it again"


def _has_type(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _shortened(value: Any) -> Any:
    return value[:5] if isinstance(value, list | str) else value


def open_gguf(path: Path, architecture: str) -> tuple[LazyArrays, Metadata]:
    """Tensors by the file's own names, axes as NumPy has them (out x in), and its metadata.

    architecture: the expected one.

    Raises:
        ValueError: not a GGUF file or a damaged one, another architecture, one part of several,
            big-endian byte order, or a quantization that the library cannot dequantize.
    """
    kind = gguf_header.architecture(path)
    # Checked first, because the library is slow to decode a large vocabulary.
    where, rule = f"{path}: general.architecture", f"only {architecture} is supported"
    check(kind == architecture, where, kind, rule, f"Use a model of type {architecture}")
    gguf = require_package("gguf", "path", str(path))
    try:
        # Offsets in a damaged file may overflow; the reader detects them itself.
        with np.errstate(over="ignore"):
            reader = gguf.GGUFReader(path)
    # A damaged file may raise any exception in the library.
    except Exception as error:
        rule = f"is damaged or not a GGUF file ({str(error).strip() or type(error).__name__})"
        fail(str(path), f"{path.stat().st_size} bytes", rule, "Copy or download it again")
    fields = Metadata(str(path), reader.fields)
    parts = fields.get("split.count", int, 0)
    rule = "is one part of several"
    check(parts < 2, str(path), parts, rule, "Join them: llama-gguf-split --merge FIRST OUTPUT")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    supported = {
        kind: _can_dequantize(gguf, kind) for kind in {t.tensor_type for t in tensors.values()}
    }
    other = [
        f"{n} ({t.tensor_type.name})" for n, t in tensors.items() if not supported[t.tensor_type]
    ]
    rule = "contains tensors that cannot be dequantized"
    check(not other, str(path), other[:10], rule, "Use a file of another quantization")
    specs = {
        name: ArraySpec(
            tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name
        )
        for name, tensor in tensors.items()
    }

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        # Read rather than memory-mapped: mapped pages would count as memory of the process.
        raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
        rule = "the file was truncated while it was read"
        check(raw.size == tensor.n_bytes, str(path), name, rule, "Copy it again")
        values = raw.view(tensor.data.dtype).reshape(tensor.data.shape)
        if tensor.tensor_type.name in _UNQUANTIZED:
            return np.asarray(values, np.float32)
        values = gguf.dequantize(values, tensor.tensor_type)
        return np.asarray(values, np.float32).reshape(specs[name].shape)

    return LazyArrays(str(path), specs, read), fields


def _can_dequantize(gguf: Any, kind: Any) -> bool:
    if kind.name in _UNQUANTIZED:
        return True
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
