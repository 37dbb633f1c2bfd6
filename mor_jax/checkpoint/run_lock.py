"""Keeping a directory for one job where the file system knows no locks, such as an object store.

The holder rewrites a small file every few seconds. Whoever finds such a file waits to see whether
it still changes: if not, its holder is gone, however it ended.
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
"""Seconds between two signs of life."""

_MISSED = 4
"""Signs of life that must be missing before a holder counts as gone."""


class RunLocked(Exception):
    """Somebody else holds the file; the text says who."""


class RunLock:
    """Holds `file` inside the block. Raises `Held` if another does, which may take 20 seconds.

    owner: who this is, for the message of others. every: seconds between signs of life.
    """

    def __init__(self, file: epath.Path, owner: str, every: float = EVERY):
        self._file, self._owner, self._every = file, owner, every
        self._id, self._counter = uuid.uuid4().hex, 0
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        self._wait_while_alive()
        self._write()
        # Of two that come at the same time the later writer has it.
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
                # This process was out for so long that it was taken for dead.
                print(f"error: {self._file.parent}: {other} took it over", file=sys.stderr)
                sys.stderr.flush()
                os._exit(exit_codes.ERROR)
            except OSError as error:
                print(f"{self._file}: no sign of life written: {error}", file=sys.stderr)

    def _write(self) -> None:
        self._counter += 1
        record = {"owner": self._owner, "id": self._id, "counter": self._counter}
        self._file.write_text(json.dumps(record))

    def _read(self) -> dict[str, object] | None:
        # None: there is no file. Empty: it is being written, or was cut short.
        try:
            return json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
