"""Tensors into safetensors files as Hugging Face lays them out: one file, or shards with an index.

Tensors go to disk one by one, while the next ones are being read.
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
"""Bytes of a shard: few files, and a conversion that needs little memory."""

_NUMPY = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_shards(
    directory: Path, tensors: LazyArrays, dtype: Dtype = "float32", shard_bytes: int = DEFAULT_SHARD
) -> list[str]:
    """Writes `tensors`, in their order, to files of at most `shard_bytes`; returns their names.

    A tensor larger than that has a file of its own. Memory: a few tensors, however large a shard.

    Raises:
        ValueError: a value is too large for `dtype`, and what reading `tensors` raises.
    """
    check(dtype in DTYPES, "dtype", dtype, f"must be one of {DTYPES}", "Try 'float32'")
    plan = list(plan_shards(tensors, np.dtype(_NUMPY[dtype]).itemsize, shard_bytes))
    files = [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    files = [ONE_FILE] if len(plan) == 1 else files
    settled = []
    with concurrent.futures.ThreadPoolExecutor(1, "settle") as thread:
        for file, names in zip(files, plan, strict=True):
            _write(directory / file, tensors, names, dtype)
            # The disk takes it while the next one is written.
            settled.append(thread.submit(fsync, directory / file))
        for done in settled:
            done.result()
    if len(plan) > 1:
        _write_index(directory, tensors, dict(zip(files, plan, strict=True)), dtype)
    return files


def _write(path: Path, tensors: LazyArrays, names: list[str], dtype: Dtype) -> None:
    """One safetensors file: the header's length in 8 bytes, the header as JSON, the values.

    The library writes only what is in memory all at one time: a shard, gathered first and written
    then, which takes longer by half.
    """
    # Readers in PyTorch ask for the framework that the tensors are for.
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
    """Names of each shard's tensors, in their order."""
    rule = "must be at least a megabyte"
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
    """float32 values in `dtype`, rounded to nearest. Raises `ValueError` where that overflows."""
    if dtype == "float32":
        return np.ascontiguousarray(value, np.float32)
    largest = float(jnp.finfo(_NUMPY[dtype]).max)
    reach = float(np.max(np.abs(value), initial=0.0))
    rule = f"{name} reaches {reach:.3g}, more than {dtype} holds"
    check(reach <= largest, "dtype", dtype, rule, "Use 'bfloat16' or 'float32'")
    return value.astype(_NUMPY[dtype])


def _write_index(
    directory: Path, tensors: LazyArrays, shards: dict[str, list[str]], dtype: Dtype
) -> None:
    itemsize = np.dtype(_NUMPY[dtype]).itemsize
    total = sum(math.prod(spec.shape) for spec in tensors.specs.values()) * itemsize
    where = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
