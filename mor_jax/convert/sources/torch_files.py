"""Reads files of `torch.save`: one, several with an index, or DeepSpeed's. Never runs code."""

import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.convert.sources.shards import open_shards

# Keys under which trainers save the state dict.
_STATE_DICT_KEYS = ("module", "model", "state_dict", "model_state_dict")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_MAPPED_BYTES = 2**28


def open_torch(path: Path) -> LazyArrays:
    """The tensors of one file, memory-mapped. The state dict may be nested in a trainer's state.

    Raises:
        ValueError: the file is damaged, loading it would execute code, or it has no state dict.
    """
    torch = require_package("torch", "path", str(path))
    mapped = _Mapped(path)
    dtypes = dict(_dtypes(mapped.tensors))
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    rule = f"contains tensors of other types than {', '.join(_FLOATS)}"
    check(not other, str(path), other[:10], rule, "Use the unquantized weights of this model")
    specs = {n: ArraySpec(tuple(tensor.shape), dtypes[n]) for n, tensor in mapped.tensors.items()}

    def read(name: str) -> np.ndarray:
        # A copy, because a view would keep the file's pages in memory.
        return mapped.tensor(name).detach().to(torch.float32, copy=True).numpy()

    return LazyArrays(str(path), specs, read)


def open_sharded_torch(index: Path) -> LazyArrays:
    """The tensors of all files that `index` (`pytorch_model.bin.index.json`) lists."""
    return open_shards(index, open_torch)


def open_deepspeed(path: Path) -> tuple[LazyArrays, str, tuple[str, ...]]:
    """A DeepSpeed checkpoint of ZeRO stage 0 to 2: tensors, format and notes.

    path: the directory with `latest`, or that of one step.

    Raises:
        ValueError: missing files, or weights sharded over processes (ZeRO-3, tensor or pipeline
            parallel), which only DeepSpeed's own script merges.
    """
    step = path
    if (path / "latest").is_file():
        step = path / (path / "latest").read_text().strip()
        rule = f"'latest' names {step.name}, which does not exist"
        check(step.is_dir() and step != path, "path", str(path), rule, "Copy that directory too")
    fix = (
        "Merge them first with the script that DeepSpeed saved there: "
        f"python zero_to_fp32.py {path} OUTPUT, and convert OUTPUT"
    )
    zero3 = sorted(file.name for file in step.glob("zero_pp_rank_*_model_states.pt"))
    rule = "is a ZeRO-3 checkpoint: every process saved its own part of each weight"
    check(not zero3, str(step), zero3[:3], rule, fix)
    files = sorted(file.name for file in step.glob("*_model_states.pt"))
    layers = sorted(file.name for file in step.glob("layer_*model_states.pt"))
    rule = (
        "must contain only mp_rank_00_model_states.pt; tensor or pipeline parallel is not supported"
    )
    unsharded = files == ["mp_rank_00_model_states.pt"] and not layers
    check(unsharded, str(step), files[:5], rule, "Save without sharding in the reference's trainer")
    tensors = open_torch(step / files[0])
    notes: tuple[str, ...] = ()
    if any(spec.dtype != "float32" for spec in tensors.specs.values()):
        notes = (
            "weights are 16-bit copies; zero_to_fp32.py extracts the optimiser's float32 weights",
        )
    return tensors, f"DeepSpeed ({step.name})", notes


def load_safely(path: Path) -> Any:
    """The object that `torch.save` wrote to `path`, with memory-mapped tensors.

    Raises:
        ValueError: the file is damaged, or loading it would execute code.
    """
    torch = require_package("torch", "path", str(path))
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    rule = "is damaged: it is truncated"
    size = f"{path.stat().st_size} bytes"
    complete = not is_zip or zipfile.is_zipfile(path)
    check(complete, str(path), size, rule, "Copy or download it again")
    try:
        # The format before torch 1.6 cannot be memory-mapped; it is read into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        rule = (
            f"only tensors are loaded, but this file contains other objects or is damaged; {reason}"
        )
        fix = "Loading it could execute arbitrary code: save only the state dict instead, "
        fix += "torch.save(model.state_dict(), ...) or save_pretrained(...)"
        fail(str(path), size, rule, fix)
    # A damaged file may raise any exception in the library.
    except Exception as error:
        reason = _reason(f"{type(error).__name__}: {error}")
        rule = f"is damaged or not a file of torch.save ({reason})"
        fail(str(path), size, rule, "Copy or download it again")


def _reason(message: str) -> str:
    # Drops the library's advice to load the file unsafely.
    required = re.search(r"GLOBAL ([\w.]+)", message)
    if required:
        return f"it needs {required[1]}"
    lines = message.strip().splitlines() or ["it is truncated"]
    return lines[0].partition("Re-running")[0][:200]


class _Mapped:
    """The tensors of one file; it is mapped again every 256 MiB, so that read pages are freed."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._read = path, threading.Lock(), 0
        self.tensors = _tensors(path)

    def tensor(self, name: str) -> Any:
        """A tensor, which keeps its mapping alive."""
        with self._lock:
            if self._read > _MAPPED_BYTES:
                self.tensors, self._read = _tensors(self._path), 0
            self._read += self.tensors[name].nbytes
            return self.tensors[name]


def _tensors(path: Path) -> dict[str, Any]:
    return dict(_state_dict(path, load_safely(path)))


def _dtypes(tensors: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield name, dtype if str(tensor.layout) == "torch.strided" else str(tensor.layout)


def _state_dict(path: Path, loaded: Any) -> Mapping[str, Any]:
    torch = require_package("torch", "path", str(path))
    while isinstance(loaded, Mapping):
        if any(isinstance(value, torch.Tensor) for value in loaded.values()):
            odd = [str(k) for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
            rule = "has entries beside its tensors that are not tensors"
            check(not odd, str(path), odd[:10], rule, "Save only the state dict of the model")
            return loaded
        nested = [key for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)]
        if not nested:
            break
        loaded = loaded[nested[0]]
    keys = sorted(map(str, loaded))[:10] if isinstance(loaded, Mapping) else type(loaded).__name__
    rule = f"contains no state dict, neither at the top level nor under one of {_STATE_DICT_KEYS}"
    fail(str(path), keys, rule, "Save only the state dict of the model")
