"""Foreign files as named arrays: which reader a path needs, and the way out where none will do."""

import dataclasses
from pathlib import Path

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check, fail
from mor_jax.convert.sources.safetensors_files import open_safetensors, open_sharded_safetensors
from mor_jax.convert.sources.shards import shards_of
from mor_jax.convert.sources.torch_files import open_deepspeed, open_sharded_torch, open_torch
from mor_jax.convert.sources.ways_out import inside, way_out
from mor_jax.convert.sources.wrappers import unwrapped

INDEX = ".index.json"

# Names inside a directory, the most trusted first: safetensors before pickles. As in transformers,
# a single file goes before the index of several.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_NAMES = (*(name for one in _SINGLE for name in (one, f"{one}{INDEX}")), "pytorch_model_fsdp.bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of a foreign checkpoint. format: of the files. notes: what a report should say."""

    tensors: LazyArrays
    format: str
    notes: tuple[str, ...] = ()


def open_weights(path: Path) -> Weights:
    """Tensors at `path`: a safetensors or torch file, an index of shards, or a directory.

    Directories: Hugging Face's, accelerate's `save_state`, DeepSpeed's. Wrappers of modules in
    names are undone. Nothing is read but names, shapes and dtypes.

    Raises:
        ValueError: no weights there, damaged or missing files, or a format that needs another
            program first; the message says which.
    """
    found = _open_directory(path) if path.is_dir() else _open_file(path)
    return dataclasses.replace(found, tensors=unwrapped(found.tensors))


def check_readable(path: Path) -> None:
    """Raises `ValueError` with the way out where a model without config.json needs one.

    path: a directory, or a file of weights.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        return
    problem = way_out(inside(path) if path.is_dir() else [path.name])
    if problem is not None:
        raise ValueError(f"{path}: {problem}")


def _open_directory(path: Path) -> Weights:
    _check_one_set(path)
    for name in _NAMES:
        if (path / name).is_file():
            adapter = (path / "adapter_config.json").is_file()
            rule = "stands beside adapter_config.json: transformers would load an adapter's model"
            fix = f"Merge the adapter, move it away, or give --source={path / name}"
            check(not adapter, "path", str(path / name), rule, fix)
            return _open_file(path / name)
    if (path / "latest").is_file() or any(path.glob("*_model_states.pt")):
        return Weights(*open_deepspeed(path))
    problem = way_out(inside(path))
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return _open_file(single[0])
    found = sorted(file.name for file in path.iterdir())
    fix = f"The directory needs one of {', '.join(_NAMES)}, or DeepSpeed's 'latest'"
    fail("path", str(path), f"no weights there, only {found[:20]}", fix)


def _check_one_set(path: Path) -> None:
    """Raises `ValueError` where a single file and an index of others are both there."""
    for name in _SINGLE:
        single, index = path / name, path / f"{name}{INDEX}"
        if single.is_file() and index.is_file():
            shards = shards_of(index)
            rule = (
                f"stands beside {index.name} of {len(shards)} other files; "
                "transformers takes the single file, and they may differ"
            )
            fix = f"Move one of the two away, or give --source={single} or --source={index}"
            check(shards == {name}, "path", str(single), rule, fix)


def _open_file(path: Path) -> Weights:
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "is neither a file nor a directory"
        fail("path", str(path), f"{problem}; weights are in a file", "Check the path")
    if path.name.endswith(f".safetensors{INDEX}"):
        return Weights(open_sharded_safetensors(path), "safetensors, sharded")
    if path.suffix == ".safetensors":
        return Weights(open_safetensors(path), "safetensors")
    if path.name.endswith(INDEX):
        return Weights(open_sharded_torch(path), "torch, sharded")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return Weights(open_torch(path), "torch")
    rule = "is no format of weights that is known here"
    fail("path", str(path), rule, "Known are .safetensors, .bin, .pt, .pth, .ckpt and directories")
