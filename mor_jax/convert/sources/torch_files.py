"""Files of `torch.save`: one, several with an index, or DeepSpeed's. No code in them is run."""

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

# Where trainers put the state dict among other things.
_INSIDE = ("module", "model", "state_dict", "model_state_dict")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_MAPPED_BYTES = 2**28


def open_torch(path: Path) -> LazyArrays:
    """The tensors of one file, memory-mapped, also where the state dict is one thing among others.

    Raises:
        ValueError: the file is damaged, needs code to be executed, or holds no state dict.
    """
    torch = require_package("torch", "path", str(path))
    mapped = _Mapped(path)
    dtypes = dict(_dtypes(mapped.tensors))
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    rule = f"holds tensors that are no plain floats ({', '.join(_FLOATS)})"
    check(not other, str(path), other[:10], rule, "Take the unquantized weights of this model")
    specs = {n: ArraySpec(tuple(tensor.shape), dtypes[n]) for n, tensor in mapped.tensors.items()}

    def read(name: str) -> np.ndarray:
        # A copy: a view would let the file's pages in again, whenever it is looked at.
        return mapped.take(name).detach().to(torch.float32, copy=True).numpy()

    return LazyArrays(str(path), specs, read)


def open_sharded_torch(index: Path) -> LazyArrays:
    """The tensors of all files that `index` (`pytorch_model.bin.index.json`) lists."""
    return open_shards(index, open_torch)


def open_deepspeed(path: Path) -> tuple[LazyArrays, str, tuple[str, ...]]:
    """A DeepSpeed checkpoint of ZeRO stage 0 to 2: tensors, format and notes.

    path: the directory with `latest`, or one of a step.

    Raises:
        ValueError: files that are missing, or weights cut over processes (ZeRO-3, tensor or
            pipeline parallel), which only DeepSpeed's own script joins.
    """
    step = path
    if (path / "latest").is_file():
        step = path / (path / "latest").read_text().strip()
        rule = f"'latest' names {step.name}, which is not there"
        check(step.is_dir() and step != path, "path", str(path), rule, "Copy that directory too")
    fix = (
        f"Join them first with the script that DeepSpeed left there: python zero_to_fp32.py {path}"
    )
    fix += " OUTPUT, and convert OUTPUT"
    cut = sorted(file.name for file in step.glob("zero_pp_rank_*_model_states.pt"))
    rule = "ZeRO-3: every process has stored its own part of each weight"
    check(not cut, str(step), cut[:3], rule, fix)
    files = sorted(file.name for file in step.glob("*_model_states.pt"))
    layers = sorted(file.name for file in step.glob("layer_*model_states.pt"))
    rule = (
        "must hold the one file mp_rank_00_model_states.pt; weights are cut by tensor or pipeline"
    )
    whole = files == ["mp_rank_00_model_states.pt"] and not layers
    check(whole, str(step), files[:5], rule, "Save them whole in the reference's trainer")
    tensors = open_torch(step / files[0])
    notes: tuple[str, ...] = ()
    if any(spec.dtype != "float32" for spec in tensors.specs.values()):
        notes = ("16-bit copies; zero_to_fp32.py gives the float32 weights of the optimiser",)
    return tensors, f"DeepSpeed ({step.name})", notes


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote to `path`, tensors memory-mapped.

    Raises:
        ValueError: the file is damaged, or loading it would execute code.
    """
    torch = require_package("torch", "path", str(path))
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    rule = "is damaged: it lacks its end"
    size = f"{path.stat().st_size} bytes"
    whole = not is_zip or zipfile.is_zipfile(path)
    check(whole, str(path), size, rule, "Copy or download it again")
    try:
        # The format before torch 1.6 cannot be mapped: it is read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        rule = (
            f"only tensors are loaded from a file, and this one holds more, or is damaged; {reason}"
        )
        fix = (
            "Loading it could execute anything: whoever made it should save the state dict alone, "
        )
        fix += "torch.save(model.state_dict(), ...) or save_pretrained(...)"
        fail(str(path), size, rule, fix)
    # An altered file leads the library into errors of any kind.
    except Exception as error:
        told = _reason(f"{type(error).__name__}: {error}")
        rule = f"is damaged or no file of torch.save ({told})"
        fail(str(path), size, rule, "Copy or download it again")


def _reason(message: str) -> str:
    # The library's advice to load unsafely does not belong into ours.
    wanted = re.search(r"GLOBAL ([\w.]+)", message)
    if wanted:
        return f"it asks for {wanted[1]}"
    lines = message.strip().splitlines() or ["it ends too early"]
    return lines[0].partition("Re-running")[0][:200]


class _Mapped:
    """The tensors of one file, mapped anew every so many bytes, so that what was read can go."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._read = path, threading.Lock(), 0
        self.tensors = _tensors(path)

    def take(self, name: str) -> Any:
        """A tensor; it keeps its mapping alive as long as it is used."""
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
            rule = "holds entries among its tensors that are none"
            check(not odd, str(path), odd[:10], rule, "Save the state dict of the model alone")
            return loaded
        inside = [key for key in _INSIDE if isinstance(loaded.get(key), Mapping)]
        if not inside:
            break
        loaded = loaded[inside[0]]
    found = sorted(map(str, loaded))[:10] if isinstance(loaded, Mapping) else type(loaded).__name__
    rule = f"holds no state dict, neither at the top nor under one of {_INSIDE}"
    fail(str(path), found, rule, "Save the state dict of the model alone")
