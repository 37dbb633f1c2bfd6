"""Runs a callback before JAX aborts the process.

When JAX's coordinator is lost, or reports a lost process, JAX aborts every other process from one
of its own threads, without a helpful message. Python's signal handlers run too late, in the main
thread, which may hang. Therefore SIGABRT gets a C handler that runs in the aborting thread.
"""

import ctypes
import signal
from collections.abc import Callable

_DEFAULT = 0


class AbortHandler:
    """Calls `callback` when the process is about to abort; after it returns, the process aborts."""

    def __init__(self, callback: Callable[[], None]):
        self._callback = callback
        libc = ctypes.CDLL(None)
        self._signal = libc.signal
        self._signal.argtypes, self._signal.restype = (ctypes.c_int, ctypes.c_void_p), None
        # An attribute, because C code holds its address.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)

    def catch(self) -> None:
        """Installs the handler."""
        self._signal(int(signal.SIGABRT), ctypes.cast(self._handler, ctypes.c_void_p))

    def release(self) -> None:
        """Restores the default action."""
        self._signal(int(signal.SIGABRT), _DEFAULT)

    def _handle(self, _: int) -> None:
        self._callback()
        self.release()
