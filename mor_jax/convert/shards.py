"""Writes safetensors files in the Hugging Face layout: one file, or shards with an index.

Tensors are written one by one, while the next ones are read.
"""

import concurrent.futures
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from mor_jax.checkpoint.lazy_arrays import LazyArrays, ahead
from mor_jax.config.parsing import check
from mor_jax.files import fsync

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD = 2 * 10**9
"""Default size of a shard in bytes."""

_NUMPY = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_shards(
    directory: Path, tensors: LazyArrays, dtype: Dtype = "float32", shard_bytes: int = DEFAULT_SHARD
) -> list[str]:
    """Writes `tensors`, in order, to files of at most `shard_bytes` bytes; returns the file names.

    A larger tensor gets a file of its own. Memory: a few tensors, independent of `shard_bytes`.

    Raises:
        ValueError: a value is too large for `dtype`, or reading `tensors` fails.
    """
    check(dtype in DTYPES, "dtype", dtype, f"must be one of {DTYPES}", "Try 'float32'")
    plan = list(plan_shards(tensors, np.dtype(_NUMPY[dtype]).itemsize, shard_bytes))
    files = [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    files = [ONE_FILE] if len(plan) == 1 else files
    syncs = []
    with concurrent.futures.ThreadPoolExecutor(1, "fsync") as thread:
        for file, names in zip(files, plan, strict=True):
            _write(directory / file, tensors, names, dtype)
            # Synced in the background while the next one is written.
            syncs.append(thread.submit(fsync, directory / file))
        for sync in syncs:
            sync.result()
    if len(plan) > 1:
        _write_index(directory, tensors, dict(zip(files, plan, strict=True)), dtype)
    return files


def _write(path: Path, tensors: LazyArrays, names: list[str], dtype: Dtype) -> None:
    """One safetensors file: the header's length in 8 bytes, the header as JSON, the values.

    Written by hand because the library needs all tensors of a file in memory before it writes,
    which takes half as long again.
    """
    # transformers requires this entry.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape = tensors.specs[name].shape
        start, end = end, end + math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Values start at a multiple of 8, so that they can be mapped into memory.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, value in ahead(tensors, names):
            file.write(narrow(value, dtype, name).reshape(-1).view(np.uint8).data)


def plan_shards(tensors: LazyArrays, itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Yields the tensor names of each shard, in order. Raises `ValueError` below 1 MB a shard."""
    rule = "must be at least 1 MB"
    check(shard_bytes >= 10**6, "max_shard_size", shard_bytes, rule, "Try 2GB")
    names: list[str] = []
    filled = 0
    for name, spec in tensors.specs.items():
        size = math.prod(spec.shape) * itemsize
        if names and filled + size > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def narrow(value: np.ndarray, dtype: Dtype, name: str) -> np.ndarray:
    """float32 values as `dtype`, rounded to nearest. Raises `ValueError` if one overflows."""
    if dtype == "float32":
        return np.ascontiguousarray(value, np.float32)
    largest = float(jnp.finfo(_NUMPY[dtype]).max)
    magnitude = float(np.max(np.abs(value), initial=0.0))
    rule = f"{name} reaches {magnitude:.3g}, more than {dtype} can represent"
    check(magnitude <= largest, "dtype", dtype, rule, "Use 'bfloat16' or 'float32'")
    return value.astype(_NUMPY[dtype])


def _write_index(
    directory: Path, tensors: LazyArrays, shards: dict[str, list[str]], dtype: Dtype
) -> None:
    itemsize = np.dtype(_NUMPY[dtype]).itemsize
    total = sum(math.prod(spec.shape) for spec in tensors.specs.values()) * itemsize
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
