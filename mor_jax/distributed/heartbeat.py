"""The processes of a run watch each other, so that none waits for ever for one that is gone.

Each writes a heartbeat `<workdir>/hosts/<i>.json`, a counter and what it is doing, and reads those
of others. Silence is measured by one's own monotonic clock between changes of the counter: clocks
of other machines, and jumps of one's own, do not matter. When a process dies, the others may hang
in a collective, get an exception out of one, or be ended by JAX; whichever comes first, each
prints one message that names the dead process, and ends with `exit_codes.HOST_LOST`.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

import jax
from etils import epath

from mor_jax.distributed.abort_handler import AbortHandler
from mor_jax.distributed.startup_check import gather
from mor_jax.files import write_atomic
from mor_jax.runtime import exit_codes

DIRECTORY = "hosts"

_BEATS = 6
"""Signs of life within `hosts.heartbeat_timeout`."""

_NEIGHBOURS = 8
"""Processes that each one watches; what one finds, all read in `_END`."""

_END = "end.json"
"""Why the run ends; beside the heartbeats, written by the first who knows."""

_PATIENCE = 5
"""Seconds for a process that knows that its run is over to end by itself."""

_SIGHT = 30
"""Seconds after which a network file system shows the new files of other machines."""

_AGAIN = "Start the same command again to go on from the last checkpoint"

_STATUSES = tuple(
    f"{status}:"
    for status in (
        "UNKNOWN",
        "UNAVAILABLE",
        "INTERNAL",
        "ABORTED",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
    )
)

_SIZE = 2048
"""Bytes of a heartbeat: rewritten in place, it takes no new space, so a full disk is no death."""


class HostLost(RuntimeError):
    """Another process of the run is gone. The message names it; `code`: the exit code to end with.

    The message was printed already.
    """

    def __init__(self, message: str, code: int = exit_codes.HOST_LOST):
        super().__init__(message)
        self.code = code


class PeerMonitor:
    """Watches over the processes of a run inside the block. Costs nothing for a single one.

    All processes enter it together; it makes `path`/hosts. timeout: seconds of silence after which
    a process counts as lost. Raises `ValueError` on entering if the processes do not see each
    other's files.
    """

    def __init__(self, path: epath.Path, timeout: int):
        self._directory, self._timeout = path / DIRECTORY, timeout
        self._index, self._count = jax.process_index(), jax.process_count()
        self._several = self._count > 1
        self._every = timeout / _BEATS
        self._phase, self._counter = "start", 0
        self._last_word: dict[str, Any] = {"state": "running"}
        self._lost: HostLost | None = None
        self._telling, self._told = threading.Lock(), False
        self._ended, self._known = threading.Event(), threading.Event()
        self._aborts = AbortHandler(self._on_abort)

    def __enter__(self) -> "PeerMonitor":
        if self._several:
            me = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
            self._peers = gather(me)
            self._meet()
            self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
            self._thread.start()
            self._aborts.catch()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self._several:
            return
        if error is None or getattr(error, "code", None) == exit_codes.STOPPED:
            self.finished()
        elif not isinstance(error, HostLost):
            self.failed(error)
        self._ended.set()
        if self._lost is None:
            self._aborts.release()

    def phase(self, name: str) -> None:
        """Notes what this process is doing, such as `compile` or `step 12`."""
        self._phase = name

    def failed(self, error: BaseException) -> None:
        """Leaves word that this process ends with an error; the others end with the same code."""
        code = exit_codes.of(error)
        text = f"{type(error).__name__}: {error}"
        self._leave("failed", code, text)

    def stopped(self, reason: str) -> None:
        """Leaves word that this process stops at once, and the others have to as well."""
        self._leave("stopped", exit_codes.STOPPED, reason)

    def finished(self) -> None:
        """Leaves word that this process ends as it should; the others go on."""
        self._leave("finished", exit_codes.OK, "")

    def diagnose(self, error: BaseException) -> HostLost | None:
        """Whether `error`, out of a collective or a save, came from the end of another process.

        Waits for the evidence, up to the timeout. None: the error is this process's own, or there
        are no others.
        """
        if isinstance(error, HostLost):
            return error
        if not self._several:
            return None
        if _from_elsewhere(error):
            self._await_evidence()
        if self._lost is not None:
            self._tell()
        return self._lost

    def _await_evidence(self) -> None:
        """Until it is known who is lost, or would be if anybody were.

        In beats, as silence is counted: on a machine that is busy with other things the watch needs
        longer. A file system that hangs stops the beats, so there is an end to it.
        """
        enough = self._counter + math.ceil(self._timeout / self._every) + 3
        end = time.monotonic() + 3 * self._timeout
        while self._counter < enough and time.monotonic() < end:
            if self._known.wait(self._every):
                return

    def _leave(self, state: str, code: int, text: str) -> None:
        if not self._several or self._last_word["state"] != "running":
            return
        self._last_word = {"state": state, "code": code, "text": text[:600]}
        self._beat()
        if state != "finished":
            self._publish(self._told_by(self._index, self._last_word | {"phase": self._phase}))

    def _meet(self) -> None:
        """The first heartbeats; everybody sees everybody's or all raise `ValueError`."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self._directory / f"{self._index}.json", self._record())
            problem = ""
        except OSError as error:
            problem = f"cannot write there ({error})"
        gather(0)
        unseen = [] if problem else self._unseen()
        if unseen:
            problem = f"does not see the files of processes {unseen}"
        problems = gather(problem)
        if any(problems):
            lines = [f"  {self._who(i)}: {text}\n" for i, text in enumerate(problems) if text]
            raise ValueError(
                f"workdir={self._directory.parent}: must be one directory for all processes of the "
                f"run, but in {self._directory}\n{''.join(lines)}"
                "Use a file system that every host mounts, or an object store (gs://...)"
            )

    def _unseen(self) -> list[int]:
        until = time.monotonic() + _SIGHT
        unseen = list(range(self._count))
        while unseen and time.monotonic() < until:
            unseen = [i for i in unseen if self._read(i) is None]
            time.sleep(0.2 if unseen else 0)
        return unseen

    def _watch(self) -> None:
        """The thread: beats and reads until a process is lost or the block ends."""
        watched = [(self._index + k) % self._count for k in range(1, self._count)][:_NEIGHBOURS]
        seen: dict[int, Any] = {}
        silent = dict.fromkeys(watched, 0.0)
        before = time.monotonic()
        while not self._ended.wait(self._every):
            self._counter += 1
            self._beat()
            now = time.monotonic()
            # Whoever was suspended must not take the time for the silence of others.
            passed, before = min(now - before, 2 * self._every), now
            for i in watched:
                record = self._read(i) or seen.get(i)
                changed = record != seen.get(i)
                silent[i] = 0.0 if changed else silent[i] + passed
                seen[i] = record
                if lost := self._judge(i, record or {}, silent[i]):
                    self._end(lost)
                    return
            if published := self._published():
                self._end(published)
                return

    def _judge(self, i: int, record: dict[str, Any], silent: float) -> HostLost | None:
        state = record.get("state", "running")
        if state == "finished":
            return None
        if state == "lost":
            return HostLost(record["text"], record["code"])
        if state in ("stopped", "failed"):
            return self._told_by(i, record)
        if silent < self._timeout:
            return None
        why = f"has given no sign of life for {silent:.0f} s "
        why += f"(hosts.heartbeat_timeout={self._timeout})"
        where = f"last in phase {record.get('phase', 'start')!r}"
        mine = f"Process {self._index} was in phase {self._phase!r}"
        return HostLost(f"host lost: {self._who(i)} {why}; {where}. {mine}. {_AGAIN}")

    def _told_by(self, i: int, record: dict[str, Any]) -> HostLost:
        """The end of a process that left word."""
        what = "stopped: " if record["state"] == "stopped" else "host failed: "
        text = f"{what}{self._who(i)} ended in phase {record['phase']!r}: {record['text']}"
        again = f". {_AGAIN}" if record["state"] == "stopped" else ""
        return HostLost(text + again, record["code"])

    def _publish(self, lost: HostLost) -> None:
        """Tells all processes, also those that do not watch this one; the first word stays."""
        if self._published() is None:
            end = {"run": self._peers[0]["id"], "text": str(lost), "code": lost.code}
            try:
                write_atomic(self._directory / _END, json.dumps(end))
            except OSError as error:
                # The neighbours read it in the heartbeat.
                print(f"process {self._index}: {_END} not written: {error}", file=sys.stderr)

    def _published(self) -> HostLost | None:
        try:
            end = json.loads((self._directory / _END).read_text())
        except (OSError, ValueError):
            return None
        return HostLost(end["text"], end["code"]) if end["run"] == self._peers[0]["id"] else None

    def _end(self, lost: HostLost) -> None:
        """Tells the others, gives the main thread time to end the process, then ends it."""
        self._lost = lost
        self._last_word = {"state": "lost", "code": lost.code, "text": str(lost)}
        self._beat()
        self._publish(lost)
        self._known.set()
        self._tell()
        if not self._ended.wait(_PATIENCE):
            _exit(lost.code)

    def _tell(self) -> None:
        # Once; whichever thread comes later waits until it is said, since it may end the process.
        with self._telling:
            if not self._told:
                print(self._lost, file=sys.stderr, flush=True)
            self._told = True

    def _on_abort(self) -> None:
        """JAX, told by its coordinator or missing it, is about to abort this process."""
        self._await_evidence()
        if self._lost is not None:
            self._tell()
            self._ended.wait(_PATIENCE)
            _exit(self._lost.code)

    def _who(self, i: int) -> str:
        peer = self._peers[i]
        return f"process {i} of {self._count} (host {peer['host']}, pid {peer['pid']})"

    def _record(self) -> str:
        me = self._peers[self._index]
        record = {**me, "counter": self._counter, "phase": self._phase, **self._last_word}
        return f"{json.dumps(record):<{_SIZE}}"

    def _beat(self) -> None:
        path = self._directory / f"{self._index}.json"
        try:
            if "://" in str(path):
                path.write_text(self._record())
            else:
                with open(path, "r+") as file:
                    file.write(self._record())
                    file.truncate()
        except OSError as error:
            # The next beat may come through; if none does, the others will say so.
            print(f"process {self._index}: no heartbeat: {path}: {error}", file=sys.stderr)

    def _read(self, i: int) -> dict[str, Any] | None:
        # None: not there, of an earlier run, or just being written.
        try:
            record = json.loads((self._directory / f"{i}.json").read_text())
        except (OSError, ValueError):
            return None
        return record if record.get("id") == self._peers[i]["id"] else None


def _from_elsewhere(error: BaseException | None) -> bool:
    # JAX raises what a collective or its coordinator reports as errors of several types; the text
    # begins with the status. Memory that does not suffice, RESOURCE_EXHAUSTED, is one's own.
    while error is not None:
        if str(error).startswith(_STATUSES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


__all__ = ["DIRECTORY", "HostLost", "PeerMonitor"]
