"""Writes files for `torch.load`, one tensor at a time.

`torch.save` needs the whole model in memory. Its format is a zip archive of a pickle, which names
tensors and their storages, and one uncompressed record per storage. This module writes both and
streams the records.
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
"""Alignment of records in bytes, so that they can be memory-mapped."""

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
        ValueError: an alias of a tensor that is not written, a value too large for `dtype`, or
            reading `tensors` fails.
    """
    aliases = aliases or {}
    dangling = sorted(name for name, other in aliases.items() if other not in tensors.specs)
    rule = "must refer to tensors that are written"
    check(not dangling, "aliases", dangling, rule, "Give the name whose storage they share")
    torch = require_package("torch", "path", str(path))
    kind = getattr(torch, _STORAGES[dtype])
    state = OrderedDict(
        (name, _Tensor(_Storage(kind, str(key), math.prod(spec.shape)), spec.shape))
        for key, (name, spec) in enumerate(tensors.specs.items())
    )
    state.update((name, state[other]) for name, other in aliases.items())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", _pickle_state(state, torch))
        _write_record(archive, ".format_version", b"1")
        _write_record(archive, ".storage_alignment", str(ALIGNMENT).encode())
        _write_record(archive, "byteorder", b"little")
        for name, values in ahead(tensors, list(tensors.specs)):
            narrowed = narrow(values, dtype, name)
            _write_record(archive, f"data/{state[name].storage.key}", _little_endian(narrowed))
        _write_record(archive, "version", b"3\n")


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    kind: Any
    key: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Pickles `_Tensor` and `_Storage` in torch's own format."""

    def __init__(self, file: io.BytesIO, rebuild: Any) -> None:
        super().__init__(file, protocol=2)
        self._rebuild = rebuild

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return ("storage", obj.kind, obj.key, "cpu", obj.size)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(len(obj.shape)))
        return self._rebuild, (obj.storage, 0, obj.shape, strides, False, OrderedDict())


def _pickle_state(state: Mapping[str, _Tensor], torch: Any) -> bytes:
    file = io.BytesIO()
    # The function that every file of torch.save refers to.
    _Pickler(file, torch._utils._rebuild_tensor_v2).dump(state)
    return file.getvalue()


def _little_endian(values: np.ndarray) -> memoryview:
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("<"))
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _write_record(archive: zipfile.ZipFile, name: str, contents: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    header = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA
    # An extra field with a four-byte header pads to the next multiple.
    padding = -(header + 4) % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(contents)
