"""Handles SIGINT, SIGTERM and SIGUSR1 in every phase of a command.

The handler only records the signal: an exception raised in a handler could surface anywhere, for
example during an import. If there is something to save, the training loop checks for a signal
after the current step. If there is not (before the first completed step, after the last save), the
command checks between its phases, and a separate thread ends the process if that takes too long,
even while the main thread is importing or waiting for the compiler.

Imports nothing slow, so that a command can install the handlers in its first lines.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from mor_jax.runtime import exit_codes

KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

GRACE_SECONDS = 2.0
"""Seconds that a polling main thread has to exit before the process is ended."""

REPEAT_SECONDS = 1.0
"""Seconds within which a repeated signal counts as the same one: schedulers often send two."""


class Stopped(RuntimeError):
    """A run was stopped by a signal before its last step; the message says how to resume."""

    code = exit_codes.STOPPED


class StoppedEarly(Stopped):
    """Stopped when there was nothing to save, without consulting the other processes of the run."""


class Diverged(RuntimeError):
    """Steps of a run were not finite again after its one rollback."""

    code = exit_codes.DIVERGED


class ImmediateExit(KeyboardInterrupt):
    """A signal arrived when there was nothing to save."""


class Signals:
    """Context manager that records signals; it may be entered again inside itself.

    number: the caught signal, 0 if none. since: monotonic time of construction.
    nothing_to_save: why a signal may end the process at once; "" if the state must be saved first.
    polls: whether the main thread calls `check` regularly; if not, a signal does not wait for it.
    """

    def __init__(
        self,
        nothing_to_save: str = "no step was completed",
        again: str = "Run the same command again to resume",
        code: int = exit_codes.STOPPED,
    ) -> None:
        """again: advice at the end of the message. code: exit code of the process."""
        self.number = 0
        self.since = time.monotonic()
        self.nothing_to_save, self.polls = nothing_to_save, False
        self._again, self._code = again, code
        self._depth = 0
        self._exited = threading.Event()
        self._exit_callbacks: list[Callable[[str], Any]] = []
        self._previous_handlers: dict[int, Any] = {}
        self._previous_fd = self._read = self._write = -1

    @property
    def caught(self) -> str:
        """Name of the caught signal, "" if none."""
        return signal.Signals(self.number).name if self.number else ""

    def on_exit(self, call: Callable[[str], Any]) -> None:
        """Registers `call(reason)`, made from another thread when that one ends the process."""
        self._exit_callbacks.append(call)

    def check(self) -> None:
        """Raises `ImmediateExit` if a signal was caught and there is nothing to save."""
        if self.number and self.nothing_to_save:
            raise ImmediateExit(
                f"{self.caught}: exited at once, {self.nothing_to_save}, so nothing is lost"
            )

    def mark_unsaved(self) -> None:
        """`check`, then marks that there is something to save. Raises `ImmediateExit`."""
        self.check()
        self.nothing_to_save = ""

    def __enter__(self) -> "Signals":
        self._depth += 1
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only.
            return self
        if self._depth == 1:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # The system writes into the pipe even while the main thread runs no Python.
            self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
            self._previous_handlers = {kind: signal.getsignal(kind) for kind in KINDS}
        for kind in KINDS:
            signal.signal(kind, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._exited.set()
        if self._depth or not self._previous_handlers:
            return
        for kind, handler in self._previous_handlers.items():
            signal.signal(kind, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._previous_handlers = {}
        os.close(self._write)

    def _note(self, kind: int, _: Any) -> None:
        self.number = self.number or kind

    def _watch(self) -> None:
        first: dict[int, float] = {}
        while kinds := os.read(self._read, 64):
            for kind in kinds:
                if kind in KINDS:
                    began = first.setdefault(kind, time.monotonic())
                    again = time.monotonic() - began >= REPEAT_SECONDS
                    threading.Thread(target=self._enforce, args=(kind, again), daemon=True).start()
        os.close(self._read)

    def _enforce(self, kind: int, again: bool) -> None:
        # Ends the process unless the main thread does: inside the compiler, it runs no Python
        # signal handler.
        if not again:
            if not self.nothing_to_save or (self.polls and self._exited.wait(GRACE_SECONDS)):
                return
            if not self.nothing_to_save:
                # In the meantime there is something to save, which the main thread will do.
                return
        name = signal.Signals(kind).name
        if self._depth:
            self._end(f"{name}: exited at once, {self.nothing_to_save or 'without saving'}")

    def _end(self, message: str) -> None:
        # A callback may need a lock that the main thread holds, so the wait is limited.
        if self._exit_callbacks:
            calls = threading.Thread(target=self._run_callbacks, args=(message,), daemon=True)
            calls.start()
            calls.join(GRACE_SECONDS)
        # Written directly: the main thread may be writing to the stream.
        os.write(2, f"stopped: {message}. {self._again}\n".encode())
        os._exit(self._code)

    def _run_callbacks(self, message: str) -> None:
        for call in self._exit_callbacks:
            call(message)


__all__ = ["KINDS", "Diverged", "ImmediateExit", "Signals", "Stopped", "StoppedEarly"]
