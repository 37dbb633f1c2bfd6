"""Opens foreign checkpoints as named arrays: selects the reader, or explains what to do first."""

import dataclasses
from pathlib import Path

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check, fail
from mor_jax.convert.sources.safetensors_files import open_safetensors, open_sharded_safetensors
from mor_jax.convert.sources.shards import shards_of
from mor_jax.convert.sources.torch_files import open_deepspeed, open_sharded_torch, open_torch
from mor_jax.convert.sources.unsupported_formats import conversion_advice, files_inside
from mor_jax.convert.sources.wrappers import without_wrappers

INDEX = ".index.json"

# Names inside a directory in order of preference: safetensors before pickles and, as in
# transformers, a single file before an index of shards.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_NAMES = (*(name for one in _SINGLE for name in (one, f"{one}{INDEX}")), "pytorch_model_fsdp.bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of a foreign checkpoint. format: of the files. notes: for the report."""

    tensors: LazyArrays
    format: str
    notes: tuple[str, ...] = ()


def open_weights(path: Path) -> Weights:
    """Tensors at `path`: a safetensors or torch file, an index of shards, or a directory.

    Directories: Hugging Face, accelerate's `save_state`, DeepSpeed. Prefixes of module wrappers are
    removed from names. Reads only names, shapes and dtypes.

    Raises:
        ValueError: no weights, damaged or missing files, or a format that needs another program
            first; the message names it.
    """
    weights = _open_directory(path) if path.is_dir() else _open_file(path)
    return dataclasses.replace(weights, tensors=without_wrappers(weights.tensors))


def check_readable(path: Path) -> None:
    """Raises `ValueError` if `path`, without a config.json, is in a format that is not read.

    The message says which program converts it. path: a directory, or a file of weights.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        return
    problem = conversion_advice(files_inside(path) if path.is_dir() else [path.name])
    if problem is not None:
        raise ValueError(f"{path}: {problem}")


def _open_directory(path: Path) -> Weights:
    _check_one_set(path)
    for name in _NAMES:
        if (path / name).is_file():
            adapter = (path / "adapter_config.json").is_file()
            rule = "is beside adapter_config.json: transformers would load the adapter's model"
            fix = f"Merge the adapter, move it away, or set --source={path / name}"
            check(not adapter, "path", str(path / name), rule, fix)
            return _open_file(path / name)
    if (path / "latest").is_file() or any(path.glob("*_model_states.pt")):
        return Weights(*open_deepspeed(path))
    problem = conversion_advice(files_inside(path))
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return _open_file(single[0])
    names = sorted(file.name for file in path.iterdir())
    fix = f"The directory needs one of {', '.join(_NAMES)}, or DeepSpeed's 'latest'"
    fail("path", str(path), f"contains no weights, only {names[:20]}", fix)


def _check_one_set(path: Path) -> None:
    """Raises `ValueError` if both a single file and an index of other files exist."""
    for name in _SINGLE:
        single, index = path / name, path / f"{name}{INDEX}"
        if single.is_file() and index.is_file():
            shards = shards_of(index)
            rule = (
                f"is beside {index.name} of {len(shards)} other files; "
                "transformers loads the single file, and the two may differ"
            )
            fix = f"Move one of the two away, or set --source={single} or --source={index}"
            check(shards == {name}, "path", str(single), rule, fix)


def _open_file(path: Path) -> Weights:
    if not path.is_file():
        problem = "is a directory, not a file" if path.is_dir() else "does not exist"
        fail("path", str(path), problem, "Check the path")
    if path.name.endswith(f".safetensors{INDEX}"):
        return Weights(open_sharded_safetensors(path), "safetensors, sharded")
    if path.suffix == ".safetensors":
        return Weights(open_safetensors(path), "safetensors")
    if path.name.endswith(INDEX):
        return Weights(open_sharded_torch(path), "torch, sharded")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return Weights(open_torch(path), "torch")
    rule = "unknown format of weights"
    fix = "Supported are .safetensors, .bin, .pt, .pth, .ckpt and directories"
    fail("path", str(path), rule, fix)
