"""GGUF files: metadata, and tensors that are dequantized one at a time."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import check, fail
from mor_jax.convert.lazy import Lazy, Spec
from mor_jax.data.optional import need

_WHOLE = ("F32", "F16", "F64")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a GGUF file says besides its tensors. Values are decoded when asked for."""

    where: str
    fields: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key` (a number, a text, a list), or `default` where the file has none."""
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key: str) -> Any:
        """The value of `key`. Raises `ValueError` if the file has none."""
        check(key in self.fields, f"{self.where}: {key}", None, "is missing", "Convert it again")
        return self.get(key)


def open_gguf(path: Path) -> tuple[Lazy, Metadata]:
    """Tensors by the file's own names, axes as NumPy has them (out x in), and its metadata.

    Raises:
        ValueError: a damaged file or none, one part of several, one written for big-endian
            machines, or a quantization that the library cannot undo.
    """
    gguf = need("gguf", "path", str(path))
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        rule = f"is damaged or no GGUF file ({str(error).strip() or type(error).__name__})"
        fail(str(path), f"{path.stat().st_size} bytes", rule, "Copy or download it again")
    fields = Metadata(str(path), reader.fields)
    rule = "is written for big-endian machines"
    little = reader.endianess == gguf.GGUFEndian.LITTLE
    check(little, str(path), None, rule, "Convert it: gguf-convert-endian FILE little")
    parts = fields.get("split.count", 0)
    rule = "is one part of several"
    check(parts < 2, str(path), parts, rule, "Join them: llama-gguf-split --merge FIRST OUTPUT")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    undone = {kind: _can_undo(gguf, kind) for kind in {t.tensor_type for t in tensors.values()}}
    other = [f"{n} ({t.tensor_type.name})" for n, t in tensors.items() if not undone[t.tensor_type]]
    rule = "holds tensors whose quantization cannot be undone here"
    check(not other, str(path), other[:10], rule, "Take a file of another quantization")
    specs = {
        name: Spec(tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name)
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

    return Lazy(str(path), specs, read), fields


def _can_undo(gguf: Any, kind: Any) -> bool:
    if kind.name in _WHOLE:
        return True
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
