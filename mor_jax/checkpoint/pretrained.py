"""Weights that a run starts from: `<workdir>/initial/`, written by a conversion, read by training.

One safetensors file an array under `arrays/`, named by its dotted path, float32; and
`manifest.json`, written last and sealed: the model's configuration, the number of parameters, where
they come from, the shape of every array and the size and CRC-32 of every file.
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


def write(
    workdir: epath.PathLike, cfg: ModelConfig, params: LazyArrays, source: dict[str, Any]
) -> epath.Path:
    """Writes `params`, one array in memory at a time; returns `<workdir>/initial`.

    params: the arrays of `cfg` by their dotted paths. source: JSON values that say where they come
    from; `from` names it for people. The manifest is written last: without it nothing counts.

    Raises:
        ValueError: the directory exists, or `params` are not the arrays of `cfg` (each difference
            is listed); nothing was written then.
    """
    directory = epath.Path(workdir) / DIRECTORY
    rule = "exists already: a run starts from one set of weights"
    check(not directory.exists(), "initial", str(directory), rule, "Choose another directory")
    shapes = {name: _described(spec.shape) for name, spec in params.specs.items()}
    _check_shapes(shapes, cfg, params.where, "Convert to the model that they are of")
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
    """Whether a run in `workdir` starts from weights that were given to it."""
    return (epath.Path(workdir) / DIRECTORY).exists()


def origin(workdir: epath.PathLike) -> str:
    """`imported weights of ...`, for people; empty where the run starts from random ones."""
    if not present(workdir):
        return ""
    try:
        found = facts(workdir)["source"].get("from")
    except ValueError:
        # Only a name is missing then: whoever needs the weights themselves finds it out.
        found = None
    return f"imported weights of {found}" if found else "imported weights"


def facts(workdir: epath.PathLike) -> dict[str, Any]:
    """The manifest: `model`, `parameters`, `arrays`, `source`. Raises `ValueError` if damaged."""
    directory = epath.Path(workdir) / DIRECTORY
    try:
        return manifest.read(directory)
    except manifest.Damaged as error:
        fail("initial", str(directory), f"was not written to its end, or damaged: {error}", _FIX)


def verify(workdir: epath.PathLike, cfg: ModelConfig, *, sums: bool = True) -> dict[str, Any]:
    """Reads every file through once, or (without `sums`) looks at sizes alone; returns `facts`.

    Raises:
        ValueError: a file is missing or damaged, or the arrays are not those of `cfg`; the message
            names the file, or lists every difference.
    """
    directory, found = epath.Path(workdir) / DIRECTORY, facts(workdir)
    _check_shapes(
        found["arrays"], cfg, str(directory), "Give the settings of model.* in config.json"
    )
    try:
        manifest.verify(found, directory / _ARRAYS, sums=sums)
    except manifest.Damaged as error:
        fail("initial", str(directory), f"is damaged: {error}", _FIX)
    return found


def load(workdir: epath.PathLike, abstract: Params) -> Params:
    """The parameters, placed as asked for; every process reads only what its devices hold.

    abstract: the parameter tree as `jax.ShapeDtypeStruct`s; with their shardings, else everything
    goes to one device. Raises `ValueError` as `facts` does, for a file that cannot be read, and
    where `abstract` has other arrays.
    """
    directory = epath.Path(workdir) / DIRECTORY
    saved, wanted = facts(workdir)["arrays"], manifest.describe(abstract)
    _check_same(saved, wanted, str(directory), "Give the settings of model.* in config.json")
    leaves, structure = jax.tree.flatten(abstract)
    arrays = directory / _ARRAYS
    return structure.unflatten(
        _placed(_File(arrays / f"{name}.safetensors", name), leaf)
        for name, leaf in zip(paths(abstract), leaves, strict=True)
    )


def array(workdir: epath.PathLike, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    """A parameter by its dotted path, float32, in host memory; only the part at `index`, if given.

    Raises `ValueError` if there is none of that name, or its file cannot be read.
    """
    arrays = epath.Path(workdir) / DIRECTORY / _ARRAYS
    return _File(arrays / f"{name}.safetensors", name)((*index, ...))


class _File:
    """One array of float32 values in a file. The last part read stays, for the next device."""

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
    where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(leaf.shape, where, file, dtype=leaf.dtype)


def _save(path: epath.Path, name: str, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array, np.float32)
    if _remote(path):
        path.write_bytes(pack({name: array}))
    else:
        save_file({name: array}, path)


def _remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _described(shape: tuple[int, ...]) -> str:
    # As `manifest.describe` puts it.
    return f"float32{list(shape)}"


def _check_shapes(found: dict[str, str], cfg: ModelConfig, where: str, fix: str) -> None:
    _check_same(found, manifest.describe(abstract_params(cfg)), where, fix)


def _check_same(found: dict[str, str], wanted: dict[str, str], where: str, fix: str) -> None:
    lines = manifest.differences(found, wanted, "there")
    if lines:
        raise ValueError(
            f"{where}: holds another model's weights:\n" + "\n".join(lines) + f"\n{fix}"
        )


__all__ = ["DIRECTORY", "array", "facts", "load", "origin", "present", "verify", "write"]
