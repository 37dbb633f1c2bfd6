"""JAX's persistent compilation cache of a run, in `<workdir>/compilation_cache`.

A process that is killed while it writes an entry leaves a truncated one, which JAX can neither use
nor replace. Therefore `seal` records the sizes of complete entries, and the next start deletes all
others.
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
    """The cache entries of one run."""

    def __init__(self, path: epath.Path):
        self._path, self._seen = path, {}

    def seal(self, *, idle: bool = False) -> None:
        """Records as complete the entries that have not grown since the last call.

        idle: nothing is being compiled, so all entries are complete.
        """
        if jax.process_index() != 0 or not self._path.exists():
            return
        seen = _sizes(self._path)
        complete = {n: size for n, size in seen.items() if idle or self._seen.get(n) == size}
        if complete != _recorded_sizes(self._path):
            write_atomic(self._path / _SIZES, json.dumps(complete, indent=1))
        self._seen = seen


@contextlib.contextmanager
def use_cache_dir(workdir: epath.Path, enabled: bool) -> Iterator[Cache | None]:
    """Makes JAX use a compilation cache in `workdir` inside the block.

    Yields None, and changes nothing, if not `enabled` or if JAX_COMPILATION_CACHE_DIR is set.
    """
    if not enabled or os.environ.get(_VARIABLE):
        yield None
        return
    path, before = workdir / DIRECTORY, jax.config.jax_compilation_cache_dir
    if jax.process_index() == 0 and path.exists():
        recorded = _recorded_sizes(path)
        for name, size in _sizes(path).items():
            if recorded.get(name) != size:
                (path / name).unlink()
    _use(str(path))
    try:
        yield Cache(path)
    finally:
        _use(before)


def _use(path: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", path)
    # JAX reads the setting only at the first compilation.
    compilation_cache.reset_cache()


def _recorded_sizes(path: epath.Path) -> dict[str, int]:
    file = path / _SIZES
    return json.loads(file.read_text()) if file.exists() else {}


def _sizes(path: epath.Path) -> dict[str, int]:
    return {p.name: p.stat().length for p in path.iterdir() if p.name.endswith("-cache")}


__all__ = ["DIRECTORY", "Cache", "use_cache_dir"]
