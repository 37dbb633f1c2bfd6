"""Formats of models that are not read, and the program that converts each."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

_JOIN = "contains the shards of a distributed save. Merge them first: accelerate merge-weights"
_DEEPSPEED = (
    "contains parts of a DeepSpeed checkpoint. Merge them first with the script that DeepSpeed "
    "saved there: python zero_to_fp32.py DIR OUTPUT, and convert OUTPUT with the model's "
    "config.json"
)
_ADAPTER = "contains an adapter, not a model. Merge it first: merge_and_unload() of peft"
_META = "contains Meta's own format. Use the Hugging Face files of the same model"
_GGUF = "contains GGUF files. Give the path of one of them with --from=gguf"
# Patterns of paths inside a directory; the first match decides.
_ADVICE = {
    "adapter_config.json": _ADAPTER,
    "adapter_model.*": _ADAPTER,
    "*.distcp": _JOIN,
    "consolidated.*.pth": _META,
    "consolidated*.safetensors": _META,
    "zero_pp_rank_*": _DEEPSPEED,
    "*/zero_pp_rank_*": _DEEPSPEED,
    "model-*-of-*.safetensors": "contains shards without "
    "model.safetensors.index.json, so missing ones cannot be detected. Download the index too",
    "*.gguf": _GGUF,
}


def conversion_advice(names: Iterable[str]) -> str | None:
    """What a directory with these paths contains and how to convert it; None: unknown format."""
    names = list(names)
    for pattern, problem in _ADVICE.items():
        if any(fnmatch(name, pattern) for name in names):
            return problem
    return None


def files_inside(path: Path) -> list[str]:
    """Paths of files in a directory and its subdirectories (one level), with slashes."""
    files = [*path.glob("*"), *path.glob("*/*")]
    return sorted(file.relative_to(path).as_posix() for file in files)


__all__ = ["conversion_advice", "files_inside"]
