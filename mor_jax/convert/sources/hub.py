"""Where a model lies: a path, or a name on the Hugging Face hub that is fetched first."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import fail
from mor_jax.convert.sources.paths import check_path
from mor_jax.convert.sources.ways_out import way_out

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Everything that an import reads; of weights, one format is chosen.
_BESIDE = ["*.json", "*.jinja", "*.model", "*.txt", "*.yaml"]
_SAFE = "*.safetensors"
# Endings of names that are meant as paths, whatever they look like.
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")


def locate_model(name: str, weights: bool = True) -> Path:
    """The path `name`, or the local copy of the repository `owner/name[@revision]`.

    Only files that an import reads are fetched: configuration, tokenizer and, with `weights`,
    safetensors if there are any, else torch files. `owner/name/FILE.gguf` fetches that file alone.
    What is in the local cache is not fetched again.

    Raises:
        ValueError: neither a path nor a repository that can be reached.
    """
    check_path("source", name)
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if file.endswith(".gguf") and _NAME.fullmatch(f"{owner}/{repository}"):
        return _fetched(name, lambda hub: hub.hf_hub_download(f"{owner}/{repository}", file))
    if not _NAME.fullmatch(name) or Path(name).suffix in _FILES:
        rule = "is neither an existing path nor a name of the hub (owner/name[@revision])"
        fail("path", name, rule, "Check the path")
    repository, _, revision = name.partition("@")
    return _fetched(name, lambda hub: _snapshot(hub, repository, revision or None, weights))


class _Refused(Exception):
    """The repository can be read, and holds what this program cannot."""


def _fetched(name: str, fetch: Callable[[Any], str]) -> Path:
    hub = require_package("huggingface_hub", "path", name)
    try:
        return Path(fetch(hub))
    except _Refused as error:
        raise ValueError(f"path={name!r}: {error}") from None
    # Whatever the network, the client and the repository's owner may answer.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        told = f"is no existing path, and the hub does not give it ({reason[0]})"
        fix = "Check path and network, or fetch it elsewhere and give its directory"
        raise ValueError(f"path={name!r}: {told}. {fix}") from error


def _snapshot(hub: Any, repository: str, revision: str | None, weights: bool) -> str:
    # Directories inside hold other formats of the same weights.
    fetch = partial(hub.snapshot_download, repository, revision=revision, ignore_patterns=["*/*"])
    if not weights:
        return fetch(allow_patterns=_BESIDE)
    try:
        names = hub.list_repo_files(repository, revision=revision)
    except Exception as unreachable:
        # A copy in the local cache serves without a network.
        try:
            return fetch(allow_patterns=[*_BESIDE, _SAFE], local_files_only=True)
        except FileNotFoundError:
            raise unreachable from None
    problem = None if "config.json" in names else way_out(names)
    if problem is not None:
        raise _Refused(problem)
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return fetch(allow_patterns=[*_BESIDE, _SAFE if safe else "*.bin"])
