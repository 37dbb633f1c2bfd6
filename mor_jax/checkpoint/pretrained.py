"""Imported weights that a run starts from: `<workdir>/initial/`, written by a conversion.

`arrays/` holds one float32 safetensors file per array, named by its dotted path. `manifest.json`,
written last and sealed, holds the model's configuration, the number of parameters, their origin,
the shape of every array and the size and CRC-32 of every file.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as unpack
from safetensors.numpy import save as pack
from safetensors.numpy import save_file

from mor_jax.checkpoint import manifest
from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, fail
from mor_jax.models.params import abstract_params, paths
from mor_jax.types import Params

DIRECTORY = "initial"

_ARRAYS = "arrays"
_FIX = "Import the weights again, into a new directory"
_CONFIG_FIX = "Use the settings of model.* in its config.json"


def write(
    workdir: epath.PathLike, cfg: ModelConfig, params: LazyArrays, source: dict[str, Any]
) -> epath.Path:
    """Writes `params`, one array in memory at a time; returns `<workdir>/initial`.

    params: the arrays of `cfg` by their dotted paths. source: JSON values that describe their
    origin; `from` is the readable name. The manifest is written last; without it the directory is
    incomplete.

    Raises:
        ValueError: the directory exists, or `params` are not the arrays of `cfg` (the message lists
            each difference). Nothing has been written then.
    """
    directory = epath.Path(workdir) / DIRECTORY
    rule = "already exists: a run starts from one set of weights"
    check(not directory.exists(), "initial", str(directory), rule, "Choose another directory")
    shapes = {name: _description(spec.shape) for name, spec in params.specs.items()}
    _check_shapes(shapes, cfg, params.where, "Convert to the model that these weights belong to")
    arrays = directory / _ARRAYS
    arrays.mkdir(parents=True)
    for name in params.specs:
        _save(arrays / f"{name}.safetensors", name, params.read(name))
    facts = {
        "model": dataclasses.asdict(cfg),
        "parameters": sum(math.prod(spec.shape) for spec in params.specs.values()),
        "arrays": shapes,
        "source": source,
    }
    manifest.write(directory, facts, arrays)
    return directory


def present(workdir: epath.PathLike) -> bool:
    """Whether the run in `workdir` starts from imported weights."""
    return (epath.Path(workdir) / DIRECTORY).exists()


def origin(workdir: epath.PathLike) -> str:
    """`imported weights of MODEL`, for messages; "" if the run starts from random weights."""
    if not present(workdir):
        return ""
    try:
        name = facts(workdir)["source"].get("from")
    except ValueError:
        # Only the name is lost here; loading the weights reports the damage.
        name = None
    return f"imported weights of {name}" if name else "imported weights"


def facts(workdir: epath.PathLike) -> dict[str, Any]:
    """The manifest: `model`, `parameters`, `arrays`, `source`. Raises `ValueError` if damaged."""
    directory = epath.Path(workdir) / DIRECTORY
    try:
        return manifest.read(directory)
    except manifest.Damaged as error:
        fail("initial", str(directory), f"is incomplete or damaged: {error}", _FIX)


def verify(workdir: epath.PathLike, cfg: ModelConfig, *, sums: bool = True) -> dict[str, Any]:
    """Verifies the checksums of all files, or without `sums` their sizes alone; returns `facts`.

    Raises:
        ValueError: a file is missing or damaged, or the arrays are not those of `cfg`; the message
            names the file, or lists every difference.
    """
    directory, saved = epath.Path(workdir) / DIRECTORY, facts(workdir)
    _check_shapes(saved["arrays"], cfg, str(directory), _CONFIG_FIX)
    try:
        manifest.verify(saved, directory / _ARRAYS, sums=sums)
    except manifest.Damaged as error:
        fail("initial", str(directory), f"is damaged: {error}", _FIX)
    return saved


def load(workdir: epath.PathLike, abstract: Params) -> Params:
    """The parameters with the requested shardings; each process reads only its shards.

    abstract: the parameter tree as `jax.ShapeDtypeStruct`s; arrays without a sharding go to the
    first device. Raises `ValueError` as `facts` does, if a file cannot be read, and if the arrays
    differ from `abstract`.
    """
    directory = epath.Path(workdir) / DIRECTORY
    saved, model = facts(workdir)["arrays"], manifest.describe(abstract)
    _check_same(saved, model, str(directory), _CONFIG_FIX)
    leaves, structure = jax.tree.flatten(abstract)
    arrays = directory / _ARRAYS
    return structure.unflatten(
        _placed(_File(arrays / f"{name}.safetensors", name), leaf)
        for name, leaf in zip(paths(abstract), leaves, strict=True)
    )


def array(workdir: epath.PathLike, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    """A parameter by its dotted path, float32, in host memory; the slice at `index`, if given.

    Raises `ValueError` if it does not exist or its file cannot be read.
    """
    arrays = epath.Path(workdir) / DIRECTORY / _ARRAYS
    return _File(arrays / f"{name}.safetensors", name)((*index, ...))


class _File:
    """One float32 array in a file. Caches the last slice, which the next device may need too."""

    def __init__(self, path: epath.Path, name: str):
        self._path, self._name = path, name
        self._last: tuple[str, np.ndarray] | None = None

    def __call__(self, index: tuple[Any, ...]) -> np.ndarray:
        if self._last is None or self._last[0] != repr(index):
            self._last = repr(index), self._read(index)
        return self._last[1]

    def _read(self, index: tuple[Any, ...]) -> np.ndarray:
        try:
            if _remote(self._path):
                return np.ascontiguousarray(unpack(self._path.read_bytes())[self._name][index])
            with safe_open(self._path, "np") as file:
                return file.get_slice(self._name)[index]
        except (SafetensorError, OSError, KeyError) as error:
            fail("initial", str(self._path), f"cannot be read ({error})", _FIX)


def _placed(file: _File, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, file, dtype=leaf.dtype)


def _save(path: epath.Path, name: str, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array, np.float32)
    if _remote(path):
        path.write_bytes(pack({name: array}))
    else:
        save_file({name: array}, path)


def _remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _description(shape: tuple[int, ...]) -> str:
    # The format of `manifest.describe`.
    return f"float32{list(shape)}"


def _check_shapes(saved: dict[str, str], cfg: ModelConfig, place: str, fix: str) -> None:
    _check_same(saved, manifest.describe(abstract_params(cfg)), place, fix)


def _check_same(saved: dict[str, str], model: dict[str, str], place: str, fix: str) -> None:
    lines = manifest.differences(saved, model, "in the weights")
    if lines:
        raise ValueError(
            f"{place}: holds another model's weights:\n" + "\n".join(lines) + f"\n{fix}"
        )


__all__ = ["DIRECTORY", "array", "facts", "load", "origin", "present", "verify", "write"]
