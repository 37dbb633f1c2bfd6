"""Whether a job trains in a run's directory, for those who wait for its checkpoints."""

import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from mor_jax.checkpoint.run_dir import LOCK_FILE
from mor_jax.checkpoint.run_lock import EVERY
from mor_jax.files import lock_owner

_GONE = 6 * EVERY
"""Seconds without a sign of life after which a holder counts as gone."""


class TrainerStatus:
    """Who holds the directory of a run. Takes nothing and changes nothing.

    In an object store a holder counts as gone when its signs of life have stopped for 30 seconds.
    """

    def __init__(
        self, directory: epath.PathLike, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: seconds."""
        self._file, self._clock = epath.Path(directory) / LOCK_FILE, clock
        self._last, self._since = "", clock()

    def __call__(self) -> str:
        """Process and host, or "" where nobody trains."""
        return self._by_signs() if "://" in str(self._file) else holder(Path(self._file))

    def _by_signs(self) -> str:
        now = self._clock()
        told = self._file.read_text() if self._file.exists() else ""
        if told != self._last:
            self._last, self._since = told, now
        return "another process" if told and now - self._since < _GONE else ""


def holder(lock: Path) -> str:
    """Process and host that hold the lock at a local path, or "" for nobody."""
    try:
        return lock_owner(lock)
    except OSError:
        # No locks on this file system: nobody can tell.
        return "perhaps another process"
