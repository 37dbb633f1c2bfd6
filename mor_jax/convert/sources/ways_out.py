"""What looks like a model and has to go through another program first, with the way out."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

_JOIN = "holds the shards of a distributed save. Join them first: accelerate merge-weights"
_DEEPSPEED = (
    "holds parts of a DeepSpeed checkpoint. Join them first with the script that DeepSpeed left "
    "there: python zero_to_fp32.py DIR OUTPUT, and convert OUTPUT with the model's config.json"
)
_ADAPTER = "holds an adapter, not a model. Merge it first: merge_and_unload() of peft"
_META = "holds Meta's own format. Take the Hugging Face files of the same model"
_GGUF = "holds GGUF files. Give the path of one of them with --from=gguf"
# Paths inside of a directory; the first that is there decides.
_WAYS = {
    "adapter_config.json": _ADAPTER,
    "adapter_model.*": _ADAPTER,
    "*.distcp": _JOIN,
    "consolidated.*.pth": _META,
    "consolidated*.safetensors": _META,
    "zero_pp_rank_*": _DEEPSPEED,
    "*/zero_pp_rank_*": _DEEPSPEED,
    "model-*-of-*.safetensors": "holds shards without model.safetensors.index.json, so nobody "
    "knows whether all are there. Fetch the index too",
    "*.gguf": _GGUF,
}


def way_out(names: Iterable[str]) -> str | None:
    """What a directory with these paths inside holds and what to do about it; None: unknown."""
    names = list(names)
    for pattern, problem in _WAYS.items():
        if any(fnmatch(name, pattern) for name in names):
            return problem
    return None


def inside(path: Path) -> list[str]:
    """Paths of files in a directory and in the directories in it, with slashes."""
    found = [*path.glob("*"), *path.glob("*/*")]
    return sorted(file.relative_to(path).as_posix() for file in found)


__all__ = ["inside", "way_out"]
