"""Foreign files as named arrays: which reader a path needs, and the way out where none will do."""

import dataclasses
from pathlib import Path

from mor_jax.config import fail
from mor_jax.convert.lazy import Lazy
from mor_jax.convert.sources.safetensors_files import open_safetensors, open_sharded_safetensors
from mor_jax.convert.sources.torch_files import open_deepspeed, open_sharded_torch, open_torch
from mor_jax.convert.sources.wrappers import unwrapped

INDEX = ".index.json"

# Names inside a directory, the most trusted first: safetensors before pickles.
_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model_fsdp.bin",
)
_WAYS_OUT = {
    "adapter_model.*": "holds an adapter, not a model. Merge it first: merge_and_unload() of peft",
    "*.distcp": "holds the shards of a distributed save. Join them first: accelerate merge-weights",
    "**/*.distcp": "holds the shards of a distributed save. Join them first: accelerate "
    "merge-weights",
    "consolidated.*.pth": "holds Meta's own format. Take the Hugging Face files of the same model",
    "model-*-of-*.safetensors": "holds shards without model.safetensors.index.json, so nobody "
    "knows whether all are there. Fetch the index too",
    "*.gguf": "holds GGUF files. Give the path of one of them",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of a foreign checkpoint. format: of the files. notes: what a report should say."""

    tensors: Lazy
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


def _open_directory(path: Path) -> Weights:
    for name in _NAMES:
        if (path / name).is_file():
            return _open_file(path / name)
    if (path / "latest").is_file() or any(path.glob("*_model_states.pt")):
        return Weights(*open_deepspeed(path))
    for pattern, problem in _WAYS_OUT.items():
        if any(path.glob(pattern)):
            raise ValueError(f"{path}: {problem}")
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return _open_file(single[0])
    found = sorted(file.name for file in path.iterdir())
    fix = f"The directory needs one of {', '.join(_NAMES)}, or DeepSpeed's 'latest'"
    fail("path", str(path), f"no weights there, only {found[:20]}", fix)


def _open_file(path: Path) -> Weights:
    if not path.is_file():
        fail("path", str(path), "is neither a file nor a directory", "Check the path")
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
