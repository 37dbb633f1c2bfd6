"""Reads safetensors files: one, or several with an index. 16-bit floats widen exactly."""

import json
from pathlib import Path

import numpy as np

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import fail
from mor_jax.convert.sources.shards import open_shards

# dtype in the file -> our name of it, and the NumPy type to read its bytes as.
_DTYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}


def open_safetensors(path: Path) -> LazyArrays:
    """The tensors of one file. Values are read on demand, one tensor at a time.

    Raises:
        ValueError: the file is damaged, not a safetensors file, or has tensors of other types.
    """
    _check_format(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    other = [
        f"{name} ({entry['dtype']})"
        for name, entry in header.items()
        if entry["dtype"] not in _DTYPES
    ]
    if other:
        rule = f"contains tensors of other types than {', '.join(_DTYPES)}"
        fail(str(path), other[:10], rule, "Use the unquantized files of this model")
    specs = {
        name: ArraySpec(tuple(entry["shape"]), _DTYPES[entry["dtype"]][0])
        for name, entry in header.items()
    }

    def read(name: str) -> np.ndarray:
        spec, raw = specs[name], _DTYPES[header[name]["dtype"]][1]
        start, end = header[name]["data_offsets"]
        count = (end - start) // np.dtype(raw).itemsize
        values = np.fromfile(path, raw, count, offset=8 + size + start)
        if values.size != count:
            fail(str(path), name, "the file was truncated while it was read", "Copy it again")
        return widened(values, spec.dtype).reshape(spec.shape)

    return LazyArrays(str(path), specs, read)


def open_sharded_safetensors(index: Path) -> LazyArrays:
    """The tensors of all files that `index` (`model.safetensors.index.json`) lists."""
    return open_shards(index, open_safetensors)


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as float32. Values of dtype bfloat16 are passed as their bits, uint16."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _check_format(path: Path) -> None:
    # The library checks that ranges lie inside the file, without gaps or overlaps.
    safetensors = require_package("safetensors", "path", str(path))
    # Raises PermissionError for an unreadable file, which the library reports like a damaged one.
    path.open("rb").close()
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        rule = f"is damaged or not a safetensors file ({error})"
        fail(str(path), f"{path.stat().st_size} bytes", rule, "Copy or download it again")
