"""Compiled programs kept between the starts of a run, in `<workdir>/compilation_cache`.

A process that is killed while it writes an entry leaves a part of it, which would be found unusable
and never be replaced. So the sizes of entries known to be whole are noted (`seal`), and the next
start drops all others.
"""

import contextlib
import json
import os
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from mor_jax.files import write_atomic

DIRECTORY = "compilation_cache"

_SIZES = "sizes.json"
_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


class Cache:
    """The entries of one run."""

    def __init__(self, path: epath.Path):
        self._path, self._seen = path, {}

    def seal(self, *, idle: bool = False) -> None:
        """Notes the entries that have not grown since the last call as whole.

        idle: nothing is being compiled any more, so all are.
        """
        if jax.process_index() != 0 or not self._path.exists():
            return
        seen = _sizes(self._path)
        whole = {name: size for name, size in seen.items() if idle or self._seen.get(name) == size}
        if whole != _noted(self._path):
            write_atomic(self._path / _SIZES, json.dumps(whole, indent=1))
        self._seen = seen


@contextlib.contextmanager
def kept_in(workdir: epath.Path, wanted: bool) -> Iterator[Cache | None]:
    """Lets JAX keep compiled programs in `workdir` and look for them there, inside the block.

    None, and nothing changes, if it is not `wanted` or JAX_COMPILATION_CACHE_DIR names another
    place.
    """
    if not wanted or os.environ.get(_VARIABLE):
        yield None
        return
    path, before = workdir / DIRECTORY, jax.config.jax_compilation_cache_dir
    if jax.process_index() == 0 and path.exists():
        noted = _noted(path)
        for name, size in _sizes(path).items():
            if noted.get(name) != size:
                (path / name).unlink()
    _use(str(path))
    try:
        yield Cache(path)
    finally:
        _use(before)


def _use(path: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", path)
    # The directory is read at the first compilation and not again.
    compilation_cache.reset_cache()


def _noted(path: epath.Path) -> dict[str, int]:
    file = path / _SIZES
    return json.loads(file.read_text()) if file.exists() else {}


def _sizes(path: epath.Path) -> dict[str, int]:
    return {p.name: p.stat().length for p in path.iterdir() if p.name.endswith("-cache")}


__all__ = ["DIRECTORY", "Cache", "kept_in"]
