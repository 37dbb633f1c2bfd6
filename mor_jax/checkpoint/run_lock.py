"""A lock on a directory where the file system has no locks, such as an object store.

The holder rewrites a small file every few seconds (its heartbeat). A process that wants the lock
waits to see whether the file changes; if it does not, the holder has ended.
"""

import json
import os
import sys
import threading
import time
import uuid

from etils import epath

from mor_jax.runtime import exit_codes

EVERY = 5.0
"""Seconds between two heartbeats."""

_MISSED = 4
"""Missed heartbeats after which a holder counts as ended."""


class RunLocked(Exception):
    """Another job holds the lock; the message names it."""


class RunLock:
    """Holds the lock `file` inside the block.

    Raises `RunLocked` if another job holds it; finding out takes up to 20 seconds.
    owner: the name of this job, for the messages of others. every: seconds between heartbeats.
    """

    def __init__(self, file: epath.Path, owner: str, every: float = EVERY):
        self._file, self._owner, self._every = file, owner, every
        self._id, self._counter = uuid.uuid4().hex, 0
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        self._wait_while_alive()
        self._write()
        # If two processes arrive at the same time, the later writer gets the lock.
        time.sleep(self._every / 5)
        self._check()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _wait_while_alive(self) -> None:
        first = self._read()
        until = time.monotonic() + _MISSED * self._every
        while first is not None and time.monotonic() < until:
            time.sleep(self._every / 5)
            now = self._read()
            if now is None:
                return
            if now and now != first:
                raise RunLocked(str(now.get("owner")))

    def _check(self) -> None:
        now = self._read()
        if now and now.get("id") != self._id:
            raise RunLocked(str(now.get("owner")))

    def _renew(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self._check()
                self._write()
            except RunLocked as other:
                # This process was suspended for so long that its lock expired.
                print(f"error: {self._file.parent}: {other} took it over", file=sys.stderr)
                sys.stderr.flush()
                os._exit(exit_codes.ERROR)
            except OSError as error:
                print(f"{self._file}: heartbeat not written: {error}", file=sys.stderr)

    def _write(self) -> None:
        self._counter += 1
        record = {"owner": self._owner, "id": self._id, "counter": self._counter}
        self._file.write_text(json.dumps(record))

    def _read(self) -> dict[str, object] | None:
        # None: the file does not exist. Empty: it is being written, or was truncated.
        try:
            return json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
