"""Heartbeats: the processes of a run monitor each other, so that none waits for a lost one.

Each process writes a heartbeat `<workdir>/hosts/<i>.json` with a counter and its current phase, and
reads those of others. The time without a heartbeat is measured with the local monotonic clock, so
neither other machines' clocks nor clock changes matter. When a process dies, the others may hang in
a collective, get an exception from one, or be aborted by JAX; whichever comes first, each prints
one message that names the lost process, and exits with `exit_codes.HOST_LOST`.
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
"""Heartbeats within `hosts.heartbeat_timeout`."""

_NEIGHBOURS = 8
"""Processes that each process watches; it reports a lost one to all others in `_END`."""

_END = "end.json"
"""File with the reason why the run ends, written by the first process that detects it."""

_EXIT_GRACE = 5
"""Seconds for the main thread to exit after a process was lost."""

_VISIBILITY_TIMEOUT = 30
"""Seconds until a network file system shows new files of other machines."""

_RESUME = "Run the same command again to resume from the last checkpoint"

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
"""Bytes of a heartbeat. It is rewritten in place, so it needs no space on a full disk."""


class HostLost(RuntimeError):
    """Another process of the run was lost. The message names it; `code`: the exit code to use.

    The message has already been printed.
    """

    def __init__(self, message: str, code: int = exit_codes.HOST_LOST):
        super().__init__(message)
        self.code = code


class PeerMonitor:
    """Monitors the processes of a run inside the block. Does nothing for a single process.

    All processes enter it together; it creates `path`/hosts. timeout: seconds without a heartbeat
    after which a process counts as lost. Raises `ValueError` on entry if the processes do not see
    each other's files.
    """

    def __init__(self, path: epath.Path, timeout: int):
        self._directory, self._timeout = path / DIRECTORY, timeout
        self._index, self._count = jax.process_index(), jax.process_count()
        self._multiprocess = self._count > 1
        self._every = timeout / _BEATS
        self._phase, self._counter = "start", 0
        self._status: dict[str, Any] = {"state": "running"}
        self._lost: HostLost | None = None
        self._print_lock, self._printed = threading.Lock(), False
        self._ended, self._lost_event = threading.Event(), threading.Event()
        self._aborts = AbortHandler(self._on_abort)

    def __enter__(self) -> "PeerMonitor":
        if self._multiprocess:
            me = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
            self._peers = gather(me)
            self._exchange_first_heartbeats()
            self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
            self._thread.start()
            self._aborts.catch()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self._multiprocess:
            return
        if error is None or getattr(error, "code", None) == exit_codes.STOPPED:
            self.finished()
        elif not isinstance(error, HostLost):
            self.failed(error)
        self._ended.set()
        if self._lost is None:
            self._aborts.release()

    def phase(self, name: str) -> None:
        """Sets the current phase of this process, such as `compile` or `step 12`."""
        self._phase = name

    def failed(self, error: BaseException) -> None:
        """Reports that this process ends with an error; the others exit with the same code."""
        code = exit_codes.of(error)
        text = f"{type(error).__name__}: {error}"
        self._report("failed", code, text)

    def stopped(self, reason: str) -> None:
        """Reports that this process stops at once; the others stop too."""
        self._report("stopped", exit_codes.STOPPED, reason)

    def finished(self) -> None:
        """Reports that this process ends normally; the others continue."""
        self._report("finished", exit_codes.OK, "")

    def diagnose(self, error: BaseException) -> HostLost | None:
        """Whether `error`, from a collective or a save, was caused by the loss of another process.

        Waits up to the timeout until that is certain. Returns None if the error is this process's
        own or there are no other processes.
        """
        if isinstance(error, HostLost):
            return error
        if not self._multiprocess:
            return None
        if _is_distributed_error(error):
            self._await_evidence()
        if self._lost is not None:
            self._print_once()
        return self._lost

    def _await_evidence(self) -> None:
        """Waits until a lost process is known, or would have been detected.

        Counted in heartbeats, because the watching thread is slower on a busy machine, with a time
        limit, because a hanging file system stops the heartbeats.
        """
        enough = self._counter + math.ceil(self._timeout / self._every) + 3
        end = time.monotonic() + 3 * self._timeout
        while self._counter < enough and time.monotonic() < end:
            if self._lost_event.wait(self._every):
                return

    def _report(self, state: str, code: int, text: str) -> None:
        if not self._multiprocess or self._status["state"] != "running":
            return
        self._status = {"state": state, "code": code, "text": text[:600]}
        self._beat()
        if state != "finished":
            self._publish(self._reported_by(self._index, self._status | {"phase": self._phase}))

    def _exchange_first_heartbeats(self) -> None:
        """Writes the first heartbeats. Raises `ValueError` everywhere unless all see all files."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self._directory / f"{self._index}.json", self._record())
            problem = ""
        except OSError as error:
            problem = f"cannot write to it ({error})"
        gather(0)
        unseen = [] if problem else self._unseen()
        if unseen:
            problem = f"does not see the files of processes {unseen}"
        problems = gather(problem)
        if any(problems):
            lines = [f"  {self._name(i)}: {text}\n" for i, text in enumerate(problems) if text]
            raise ValueError(
                f"workdir={self._directory.parent}: must be one directory for all processes of the "
                f"run, but in {self._directory}\n{''.join(lines)}"
                "Use a file system that every host mounts, or an object store (gs://...)"
            )

    def _unseen(self) -> list[int]:
        until = time.monotonic() + _VISIBILITY_TIMEOUT
        unseen = list(range(self._count))
        while unseen and time.monotonic() < until:
            unseen = [i for i in unseen if self._read(i) is None]
            time.sleep(0.2 if unseen else 0)
        return unseen

    def _watch(self) -> None:
        """The thread: writes and reads heartbeats until a process is lost or the block ends."""
        watched = [(self._index + k) % self._count for k in range(1, self._count)][:_NEIGHBOURS]
        seen: dict[int, Any] = {}
        silent = dict.fromkeys(watched, 0.0)
        before = time.monotonic()
        while not self._ended.wait(self._every):
            self._counter += 1
            self._beat()
            now = time.monotonic()
            # If this process was suspended, that time must not count as silence of the others.
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
            return self._reported_by(i, record)
        if silent < self._timeout:
            return None
        rule = f"has sent no heartbeat for {silent:.0f} s "
        rule += f"(hosts.heartbeat_timeout={self._timeout})"
        theirs = f"last in phase {record.get('phase', 'start')!r}"
        ours = f"Process {self._index} was in phase {self._phase!r}"
        return HostLost(f"host lost: {self._name(i)} {rule}; {theirs}. {ours}. {_RESUME}")

    def _reported_by(self, i: int, record: dict[str, Any]) -> HostLost:
        """The loss of a process that reported its end."""
        prefix = "stopped: " if record["state"] == "stopped" else "host failed: "
        text = f"{prefix}{self._name(i)} ended in phase {record['phase']!r}: {record['text']}"
        advice = f". {_RESUME}" if record["state"] == "stopped" else ""
        return HostLost(text + advice, record["code"])

    def _publish(self, lost: HostLost) -> None:
        """Reports it to all processes, also to those that do not watch this one; the first wins."""
        if self._published() is None:
            end = {"run": self._peers[0]["id"], "text": str(lost), "code": lost.code}
            try:
                write_atomic(self._directory / _END, json.dumps(end))
            except OSError as error:
                # The neighbours still read it in the heartbeat.
                print(f"process {self._index}: {_END} not written: {error}", file=sys.stderr)

    def _published(self) -> HostLost | None:
        try:
            end = json.loads((self._directory / _END).read_text())
        except (OSError, ValueError):
            return None
        return HostLost(end["text"], end["code"]) if end["run"] == self._peers[0]["id"] else None

    def _end(self, lost: HostLost) -> None:
        """Informs the others, waits for the main thread to end the process, then ends it."""
        self._lost = lost
        self._status = {"state": "lost", "code": lost.code, "text": str(lost)}
        self._beat()
        self._publish(lost)
        self._lost_event.set()
        self._print_once()
        if not self._ended.wait(_EXIT_GRACE):
            _exit(lost.code)

    def _print_once(self) -> None:
        # The lock makes a second thread wait for the output, because it may then end the process.
        with self._print_lock:
            if not self._printed:
                print(self._lost, file=sys.stderr, flush=True)
            self._printed = True

    def _on_abort(self) -> None:
        """Called when JAX is about to abort this process, for a lost process or coordinator."""
        self._await_evidence()
        if self._lost is not None:
            self._print_once()
            self._ended.wait(_EXIT_GRACE)
            _exit(self._lost.code)

    def _name(self, i: int) -> str:
        peer = self._peers[i]
        return f"process {i} of {self._count} (host {peer['host']}, pid {peer['pid']})"

    def _record(self) -> str:
        me = self._peers[self._index]
        record = {**me, "counter": self._counter, "phase": self._phase, **self._status}
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
            # The next heartbeat may succeed; if none does, the others report it.
            print(f"process {self._index}: no heartbeat: {path}: {error}", file=sys.stderr)

    def _read(self, i: int) -> dict[str, Any] | None:
        # None: missing, of an earlier run, or just being written.
        try:
            record = json.loads((self._directory / f"{i}.json").read_text())
        except (OSError, ValueError):
            return None
        return record if record.get("id") == self._peers[i]["id"] else None


def _is_distributed_error(error: BaseException | None) -> bool:
    # JAX raises errors of collectives and of its coordinator as several types; the text begins with
    # the status. RESOURCE_EXHAUSTED (out of memory) is this process's own error.
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
