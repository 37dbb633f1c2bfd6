"""Files that `torch.load` reads, written one tensor at a time.

`torch.save` wants the whole model in memory. Its file is a zip archive, though: a pickle that
names tensors and their storages, and one uncompressed record of bytes for each storage. Both are
written here, the records as the tensors come.
"""

import dataclasses
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.checkpoint.lazy_arrays import LazyArrays, ahead
from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check
from mor_jax.convert.shards import Dtype, narrow

ALIGNMENT = 64
"""Bytes at whose multiples records begin, so that they can be used where they are mapped."""

_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}


def write_torch(
    path: Path,
    tensors: LazyArrays,
    aliases: Mapping[str, str] | None = None,
    dtype: Dtype = "float32",
) -> None:
    """Writes a state dict to `path`, for `torch.load(path, weights_only=True)`.

    aliases: further names -> the name whose storage they share. Memory: a few tensors.

    Raises:
        ValueError: an alias of nothing, a value too large for `dtype`, and what reading raises.
    """
    aliases = aliases or {}
    lost = sorted(name for name, other in aliases.items() if other not in tensors.specs)
    check(not lost, "aliases", lost, "name tensors that are not written", "Name what they repeat")
    torch = require_package("torch", "path", str(path))
    kind = getattr(torch, _STORAGES[dtype])
    state = OrderedDict(
        (name, _Tensor(_Storage(kind, str(key), math.prod(spec.shape)), spec.shape))
        for key, (name, spec) in enumerate(tensors.specs.items())
    )
    state.update((name, state[other]) for name, other in aliases.items())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "data.pkl", _pickled(state, torch))
        _record(archive, ".format_version", b"1")
        _record(archive, ".storage_alignment", str(ALIGNMENT).encode())
        _record(archive, "byteorder", b"little")
        for name, values in ahead(tensors, list(tensors.specs)):
            narrowed = narrow(values, dtype, name)
            _record(archive, f"data/{state[name].storage.key}", _little(narrowed))
        _record(archive, "version", b"3\n")


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    kind: Any
    key: str
    numbers: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes `_Tensor` and `_Storage` the way torch writes its own."""

    def __init__(self, file: io.BytesIO, rebuild: Any) -> None:
        super().__init__(file, protocol=2)
        self._rebuild = rebuild

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return ("storage", obj.kind, obj.key, "cpu", obj.numbers)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(len(obj.shape)))
        return self._rebuild, (obj.storage, 0, obj.shape, strides, False, OrderedDict())


def _pickled(state: Mapping[str, _Tensor], torch: Any) -> bytes:
    file = io.BytesIO()
    # The name under which every file of torch.save asks for tensors.
    _Pickler(file, torch._utils._rebuild_tensor_v2).dump(state)
    return file.getvalue()


def _little(values: np.ndarray) -> memoryview:
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("<"))
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _record(archive: zipfile.ZipFile, name: str, contents: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    header = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA
    # An extra field of its own kind, four bytes of head, fills up to the next multiple.
    gap = -(header + 4) % ALIGNMENT
    info.extra = b"FB" + gap.to_bytes(2, "little") + b"Z" * gap
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(contents)
