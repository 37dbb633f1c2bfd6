"""How a command is asked to end: SIGINT, SIGTERM or SIGUSR1, in whatever phase it is.

A signal is only noted: an exception out of a handler would come up anywhere, also in the middle of
an extension that is being imported. Where there is something to save the loop looks after the step
under way. Where there is nothing (before the first finished step, after the last save) the program
looks between its phases, and a thread beside it ends the process if that takes too long, even
while the main thread imports, or waits for a compiler that cannot be interrupted.

Imports nothing heavy: a command listens from its first line on.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from mor_jax.runtime import exit_codes

KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

PATIENCE = 2.0
"""Seconds that a main thread which looks has to leave before the process ends under it."""

AGAIN = 1.0
"""Seconds within which the same signal again is the same request: schedulers often send two."""


class Stopped(RuntimeError):
    """A run that ended on a signal before its last step; the message says how to go on."""

    code = exit_codes.STOPPED


class StoppedEarly(Stopped):
    """Ended where there was nothing to save, without asking other processes of the run."""


class Diverged(RuntimeError):
    """A run whose steps were not finite again after its one rollback."""

    code = exit_codes.DIVERGED


class ImmediateExit(KeyboardInterrupt):
    """A signal came when there was nothing to save."""


class Signals:
    """Listens as long as it is entered; entering it again inside is allowed.

    number: the signal that was caught, 0 before. since: monotonic time of the first entry.
    nothing_new: why a signal may end the process at once, "" where the state must be saved first.
    looks: whether the main thread calls `look` now and then; if not, nobody waits for it.
    """

    def __init__(
        self,
        nothing_new: str = "no step was finished",
        again: str = "The same command goes on",
        code: int = exit_codes.STOPPED,
    ) -> None:
        """again: said about the next start. code: that the process ends with."""
        self.number = 0
        self.since = time.monotonic()
        self.nothing_new, self.looks = nothing_new, False
        self._again, self._code = again, code
        self._depth = 0
        self._leaving = threading.Event()
        self._last_words: list[Callable[[str], Any]] = []
        self._before: dict[int, Any] = {}
        self._before_fd = self._read = self._write = -1

    @property
    def caught(self) -> str:
        """Name of the signal that was caught, "" before."""
        return signal.Signals(self.number).name if self.number else ""

    def on_leaving(self, call: Callable[[str], Any]) -> None:
        """Has `call(reason)` made, from any thread, when the process ends under its main thread."""
        self._last_words.append(call)

    def check(self) -> None:
        """Raises `ImmediateExit` if a signal was noted and there is nothing to save."""
        if self.number and self.nothing_new:
            raise ImmediateExit(
                f"{self.caught}: left at once, {self.nothing_new}, so nothing is lost"
            )

    def something_new(self) -> None:
        """Checks once more; from here on there is something to save. Raises `ImmediateExit`."""
        self.check()
        self.nothing_new = ""

    def __enter__(self) -> "Signals":
        self._depth += 1
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread alone; elsewhere there is none to catch.
            return self
        if self._depth == 1:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # The system writes into the pipe even while the main thread runs no Python.
            self._before_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
            self._before = {kind: signal.getsignal(kind) for kind in KINDS}
        for kind in KINDS:
            signal.signal(kind, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._leaving.set()
        if self._depth or not self._before:
            return
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._before = {}
        os.close(self._write)

    def _note(self, kind: int, _: Any) -> None:
        self.number = self.number or kind

    def _watch(self) -> None:
        first: dict[int, float] = {}
        while kinds := os.read(self._read, 64):
            for kind in kinds:
                if kind in KINDS:
                    began = first.setdefault(kind, time.monotonic())
                    again = time.monotonic() - began >= AGAIN
                    threading.Thread(target=self._insist, args=(kind, again), daemon=True).start()
        os.close(self._read)

    def _insist(self, kind: int, again: bool) -> None:
        # Ends the process unless the main thread does. While that is inside a compiler, no handler
        # written in Python gets its turn.
        if not again:
            if not self.nothing_new or (self.looks and self._leaving.wait(PATIENCE)):
                return
            if not self.nothing_new:
                # Meanwhile there is something to save, and the main thread knows.
                return
        name = signal.Signals(kind).name
        if self._depth:
            self._end(f"{name}: left at once, {self.nothing_new or 'without saving'}")

    def _end(self, message: str) -> None:
        # Last words may need a lock that the main thread holds: nobody waits long for them.
        if self._last_words:
            calls = threading.Thread(target=self._say, args=(message,), daemon=True)
            calls.start()
            calls.join(PATIENCE)
        # Not through a stream, which the main thread may be writing to.
        os.write(2, f"stopped: {message}. {self._again}\n".encode())
        os._exit(self._code)

    def _say(self, message: str) -> None:
        for call in self._last_words:
            call(message)


__all__ = ["KINDS", "Diverged", "ImmediateExit", "Signals", "Stopped", "StoppedEarly"]
