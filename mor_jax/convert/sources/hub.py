"""Where a model lies: a path, or a name on the Hugging Face hub that is fetched first."""

import re
from pathlib import Path

from mor_jax.config import fail
from mor_jax.data.optional import need

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Everything that an import reads; of weights, one format is chosen.
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.yaml")


def located(name: str) -> Path:
    """The path `name`, or the local copy of the repository `owner/name[@revision]`.

    Only files that an import reads are fetched: safetensors if there are any, else torch files.
    `owner/name/FILE.gguf` fetches that file alone. What is in the local cache is not fetched again.

    Raises:
        ValueError: neither a path nor a repository that can be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if file.endswith(".gguf") and _NAME.fullmatch(f"{owner}/{repository}"):
        return _fetched(f"{owner}/{repository}", file)
    if not _NAME.fullmatch(name):
        rule = "is neither an existing path nor a name of the hub (owner/name[@revision])"
        fail("path", name, rule, "Check the path")
    return _fetched(name, None)


def _fetched(name: str, file: str | None) -> Path:
    hub = need("huggingface_hub", "path", name)
    repository, _, revision = name.partition("@")
    told = "is no existing path, and the hub does not give it"
    fix = "Check path and network, or fetch it elsewhere and give its directory"
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repository, file, revision=revision or None))
        return _snapshot(hub, repository, revision or None)
    # Whatever the network, the client and the repository's owner may answer.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"path={name!r}: {told} ({reason}). {fix}") from error


def _snapshot(hub: object, repository: str, revision: str | None) -> Path:
    try:
        names = hub.list_repo_files(repository, revision=revision)
    except Exception:
        # Without network a copy in the cache still serves; if there is none, this raises again.
        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    weights = "*.safetensors" if safe else "*.bin"
    patterns = [*_BESIDE, weights]
    # Other formats of the same weights lie in directories of their own.
    return Path(
        hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    )
