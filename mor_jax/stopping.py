"""How a run is asked to end: SIGINT, SIGTERM or SIGUSR1, in whatever phase it is.

Where there is something to save, a signal is only noted, and the loop stops after the step under
way. Where there is nothing (before the first finished step, after the last save) the run leaves at
once, even while its main thread waits for a compiler that cannot be interrupted.

Imports nothing heavy: a run listens from its first line on.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mor_jax import exit_codes

KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

PATIENCE = 2.0
"""Seconds that the main thread has to leave by itself before the process ends under it."""

AGAIN = 1.0
"""Seconds within which the same signal again is the same request: schedulers often send two."""


class Stopped(RuntimeError):
    """A run that ended on a signal before its last step; the message says how to go on."""

    code = exit_codes.STOPPED


class StoppedAtOnce(Stopped):
    """Ended where there was nothing to save, without asking other processes of the run."""


class Diverged(RuntimeError):
    """A run whose steps were not finite again after its one rollback."""

    code = exit_codes.DIVERGED


class Leave(KeyboardInterrupt):
    """Raised in the main thread by a signal when there is nothing to save."""


class Signals:
    """Listens as long as it is entered; entering it again inside is allowed.

    number: the signal that was caught, 0 before. since: monotonic time of the first entry.
    nothing_new: why a signal may end the run at once, "" where the state must be saved first.
    """

    def __init__(self) -> None:
        self.number = 0
        self.since = time.monotonic()
        self.nothing_new = "no step was finished"
        self._depth = 0
        self._caught_at = 0.0
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
        now = time.monotonic()
        if self.number == kind and now - self._caught_at >= AGAIN:
            self._end(f"{self.caught} again: left at once, without saving")
        if self.number:
            return
        self.number, self._caught_at = kind, now
        if self.nothing_new:
            raise Leave(f"{self.caught}: left at once, {self.nothing_new}, so nothing is lost")

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
        # Ends the process unless the main thread does. While it is inside a compiler, no handler
        # written in Python gets its turn.
        reason = self.nothing_new
        if not again and not reason:
            return
        name = signal.Signals(kind).name
        if not self._leaving.wait(PATIENCE) and self._depth:
            self._end(f"{name}: left at once, {reason or 'without saving'}")

    def _end(self, message: str) -> None:
        # Last words may need a lock that the main thread holds: nobody waits long for them.
        calls = threading.Thread(target=self._say, args=(message,), daemon=True)
        calls.start()
        calls.join(PATIENCE)
        print(f"stopped: {message}. The same command goes on", file=sys.stderr, flush=True)
        os._exit(exit_codes.STOPPED)

    def _say(self, message: str) -> None:
        for call in self._last_words:
            call(message)


__all__ = ["KINDS", "Diverged", "Leave", "Signals", "Stopped", "StoppedAtOnce"]
