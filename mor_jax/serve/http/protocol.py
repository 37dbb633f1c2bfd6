"""Connections that waste nobody's time: bounds on what a client may send and leave unread.

An ASGI application cannot see a request line that never ends, nor end a connection whose client
has stopped reading. uvicorn leaves both open for ever, so its protocol is extended here.
"""

from typing import Any, Protocol, runtime_checkable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mor_jax.serve.http.limits import MAX_HEAD, Limits

# Requests that a client may send before it has the answer to the first.
_AHEAD = 16


@runtime_checkable
class Clock(Protocol):
    """What `call_later` gives; event loops have classes of their own."""

    def cancel(self) -> None:
        """Stops it."""


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with time limits. `bounded` makes a class for uvicorn."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._cycles: list[RequestResponseCycle] = []
        self._reading: Clock | None = None
        self._writing: Clock | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the clock for the first request line."""
        super().connection_made(transport)
        # By default nobody is told of the last 64 kB that the system does not take, and the clock
        # for a client that does not read would never start.
        transport.set_write_buffer_limits(high=0)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Ends the connection when a head grows too long."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            # Of the next request: its first bytes ended the time in which a connection may idle.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.send_400_response("The request's headers are too long.")
            elif self._reading is None:
                self._expect_head()
        else:
            self._head_bytes = 0
            self._reading = _stop(self._reading)

    def on_headers_complete(self) -> None:
        """Remembers the request: several may have come at once."""
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= _AHEAD:
            # uvicorn stops reading while a request waits for another one's answer, and so would
            # not see the client leave.
            self.flow.resume_reading()
        going = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles = [*going, self.cycle]

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks, and tells every request; uvicorn tells the last alone."""
        self._reading, self._writing = _stop(self._reading), _stop(self._writing)
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles = []

    def pause_writing(self) -> None:
        """The client does not read: the clock for that starts."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        self._writing = _stop(self._writing)
        super().resume_writing()

    def _expect_head(self) -> None:
        self._reading = self.loop.call_later(self.limits.read_timeout, self._no_head)

    def _no_head(self) -> None:
        self._reading = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def bounded(limits: Limits) -> type[BoundedProtocol]:
    """The protocol with these limits."""
    return type("Protocol", (BoundedProtocol,), {"limits": limits})


def _stop(timer: Clock | None) -> None:
    """Stops a clock that may be running; what it returns says that none is."""
    if timer is not None:
        timer.cancel()
