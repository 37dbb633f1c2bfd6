"""Locates a model: a path, or a repository of the Hugging Face hub, which is downloaded first."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import fail
from mor_jax.convert.sources.paths import check_path
from mor_jax.convert.sources.unsupported_formats import conversion_advice

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Everything that an import reads besides weights, of which one format is chosen.
_BESIDE = ["*.json", "*.jinja", "*.model", "*.txt", "*.yaml"]
_SAFE = "*.safetensors"
# Names with these suffixes are paths, never repositories.
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")


def locate_model(name: str, weights: bool = True) -> Path:
    """The path `name`, or the local copy of the repository `owner/name[@revision]`.

    Downloads only files that an import reads: configuration, tokenizer and, with `weights`,
    safetensors files, or torch files if there are none. `owner/name/FILE.gguf` downloads that file
    alone. Files in the local cache are not downloaded again.

    Raises:
        ValueError: neither an existing path nor a repository that can be reached.
    """
    check_path("source", name)
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if file.endswith(".gguf") and _NAME.fullmatch(f"{owner}/{repository}"):
        return _download(name, lambda hub: hub.hf_hub_download(f"{owner}/{repository}", file))
    if not _NAME.fullmatch(name) or Path(name).suffix in _FILES:
        rule = "is neither an existing path nor a hub repository (owner/name[@revision])"
        fail("path", name, rule, "Check the path")
    repository, _, revision = name.partition("@")
    return _download(name, lambda hub: _snapshot(hub, repository, revision or None, weights))


class _UnsupportedFormat(Exception):
    """The repository contains no weights in a supported format."""


def _download(name: str, fetch: Callable[[Any], str]) -> Path:
    hub = require_package("huggingface_hub", "path", name)
    try:
        return Path(fetch(hub))
    except _UnsupportedFormat as error:
        raise ValueError(f"path={name!r}: {error}") from None
    # Errors of the network and of the hub have many types.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        rule = f"does not exist as a path, and downloading it from the hub failed ({reason[0]})"
        fix = "Check the name and the network, or download it elsewhere and give its directory"
        raise ValueError(f"path={name!r}: {rule}. {fix}") from error


def _snapshot(hub: Any, repository: str, revision: str | None, weights: bool) -> str:
    # Subdirectories contain other formats of the same weights.
    fetch = partial(hub.snapshot_download, repository, revision=revision, ignore_patterns=["*/*"])
    if not weights:
        return fetch(allow_patterns=_BESIDE)
    try:
        names = hub.list_repo_files(repository, revision=revision)
    except Exception as unreachable:
        # Without a network, a copy in the local cache is used.
        try:
            return fetch(allow_patterns=[*_BESIDE, _SAFE], local_files_only=True)
        except FileNotFoundError:
            raise unreachable from None
    problem = None if "config.json" in names else conversion_advice(names)
    if problem is not None:
        raise _UnsupportedFormat(problem)
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return fetch(allow_patterns=[*_BESIDE, _SAFE if safe else "*.bin"])
