"""Whether a job is training in a run directory, for commands that wait for its checkpoints."""

import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from mor_jax.checkpoint.run_dir import LOCK_FILE
from mor_jax.checkpoint.run_lock import EVERY
from mor_jax.files import lock_owner

_GONE = 6 * EVERY
"""Seconds without a heartbeat after which a holder counts as ended."""


class TrainerStatus:
    """Tells which process holds the lock of a run directory; takes no lock itself.

    In an object store a holder counts as ended when its heartbeat has stopped for 30 seconds.
    """

    def __init__(
        self, directory: epath.PathLike, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: returns seconds."""
        self._file, self._clock = epath.Path(directory) / LOCK_FILE, clock
        self._last, self._since = "", clock()

    def __call__(self) -> str:
        """Process and host of the trainer, or "" if no process is training."""
        return self._by_heartbeat() if "://" in str(self._file) else holder(Path(self._file))

    def _by_heartbeat(self) -> str:
        now = self._clock()
        text = self._file.read_text() if self._file.exists() else ""
        if text != self._last:
            self._last, self._since = text, now
        return "another process" if text and now - self._since < _GONE else ""


def holder(lock: Path) -> str:
    """Process and host that hold the lock at a local path, or "" if it is not locked."""
    try:
        return lock_owner(lock)
    except OSError:
        # This file system has no locks, so the holder is unknown.
        return "perhaps another process"
