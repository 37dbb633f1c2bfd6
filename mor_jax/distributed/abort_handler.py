"""A word before JAX ends the process.

When JAX's coordinator is gone, or reports that a process is, JAX aborts every other process from a
thread of its own, at once and without saying who died in words that help. Python's own signal
handlers run too late for that, in the main thread, which may hang. So SIGABRT gets a handler that
runs where the abort happens.
"""

import ctypes
import signal
from collections.abc import Callable

_DEFAULT = 0


class AbortHandler:
    """Calls `before` when the process is about to abort; when that returns, it aborts."""

    def __init__(self, before: Callable[[], None]):
        self._before = before
        libc = ctypes.CDLL(None)
        self._signal = libc.signal
        self._signal.argtypes, self._signal.restype = (ctypes.c_int, ctypes.c_void_p), None
        # Kept for as long as this object, since C code holds its address.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)

    def catch(self) -> None:
        """From now on."""
        self._signal(int(signal.SIGABRT), ctypes.cast(self._handler, ctypes.c_void_p))

    def release(self) -> None:
        """As before `catch`."""
        self._signal(int(signal.SIGABRT), _DEFAULT)

    def _handle(self, _: int) -> None:
        self._before()
        self.release()
