"""Connections that waste nobody's time: bounds on what a client may send and leave unread.

An ASGI application cannot see a request line that never ends, nor end a connection whose client
has stopped reading. uvicorn leaves both open for ever, so its protocol is extended here.
"""

import socket
from typing import Any, Protocol, runtime_checkable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mor_jax.inference.server.limits import MAX_HEAD, Limits

# Requests that a client may send before it has the answer to the first.
_MAX_PIPELINED = 16

# How every response begins.
_STATUS_LINE_START = b"HTTP/1.1 "

# Of an event stream: a comment, which its readers leave out.
_COMMENT = b":\n\n"

# Seconds between two looks at a connection whose client sends no more.
_PROBE_SECONDS = 0.05


@runtime_checkable
class Timer(Protocol):
    """What `call_later` gives; event loops have classes of their own."""

    def cancel(self) -> None:
        """Stops it."""


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with time limits. `bounded` makes a class for uvicorn."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._cycles: list[RequestResponseCycle] = []
        self._head_timer: Timer | None = None
        self._write_timer: Timer | None = None
        # A client that sends no more and may still read: the clock that looks whether it does.
        self._probe_timer: Timer | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the clock for the first request line."""
        super().connection_made(transport)
        # By default nobody is told of the last 64 kB that the system does not take, and the clock
        # for a client that does not read would never start.
        transport.set_write_buffer_limits(high=0)
        self._start_head_timer()

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
            elif self._head_timer is None:
                self._start_head_timer()
        else:
            self._head_bytes = 0
            self._head_timer = _cancel(self._head_timer)

    def on_headers_complete(self) -> None:
        """Remembers the request: several may have come at once."""
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= _MAX_PIPELINED:
            # uvicorn stops reading while a request waits for another one's answer, and so would
            # not see the client leave.
            self.flow.resume_reading()
        self._cycles = [*self._open_cycles(), self.cycle]

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks, and tells every request; uvicorn tells the last alone."""
        self._head_timer, self._write_timer = _cancel(self._head_timer), _cancel(self._write_timer)
        self._probe_timer = _cancel(self._probe_timer)
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles = []

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. If it has asked for something it may wait for the answer.

        Or it has left: both look the same until something is sent to it, which one that has left
        returns. So a few bytes of the answer go ahead. True keeps the connection.
        """
        open_cycles = self._open_cycles()
        if not open_cycles or open_cycles[-1].more_body or self.transport.is_closing():
            return False
        if self._probe_timer is None:
            _send_ahead(open_cycles[0])
            self._probe_timer = self.loop.call_later(_PROBE_SECONDS, self._probe)
        return True

    def on_response_complete(self) -> None:
        """Ends the connection if no request can follow."""
        super().on_response_complete()
        if (
            self._probe_timer is not None
            and not self._open_cycles()
            and not self.transport.is_closing()
        ):
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read: the clock for that starts."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self.limits.write_timeout, self.transport.abort
            )

    def resume_writing(self) -> None:
        """It has read."""
        self._write_timer = _cancel(self._write_timer)
        super().resume_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        is_http_1_0 = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _without_chunking(cycle, app) if is_http_1_0 else app)

    def _open_cycles(self) -> list[RequestResponseCycle]:
        """Requests whose answers are not complete, oldest first."""
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _probe(self) -> None:
        self._probe_timer = self.loop.call_later(_PROBE_SECONDS, self._probe)
        sock = self.transport.get_extra_info("socket")
        # Nobody reads from this connection any more, so nobody is told what came back.
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.read_timeout, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def limited_protocol(limits: Limits) -> type[LimitedProtocol]:
    """The protocol with these limits."""
    return type("Protocol", (LimitedProtocol,), {"limits": limits})


class _StartedTransport:
    """The transport of a response whose `_BEGINNING` is out: leaves that out of what it writes."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport

    def write(self, data: bytes) -> None:
        """The first write, which has the rest of the status line."""
        self._cycle.transport = self._transport
        self._transport.write(data.removeprefix(_STATUS_LINE_START))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _send_ahead(cycle: RequestResponseCycle) -> None:
    """Sends a few bytes that the answer has in any case, or that change nothing in it."""
    if not cycle.response_started:
        cycle.transport.write(_STATUS_LINE_START)
        cycle.transport = _StartedTransport(cycle)  # type: ignore[assignment]
    elif cycle.chunked_encoding:
        # Only event streams have no length.
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(_COMMENT), _COMMENT))


def _without_chunking(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """The application for a client of HTTP/1.0, which does not know chunks: its answer goes as it
    is, and ends with the connection."""
    cycle.chunked_encoding = False

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unframed(message: Message) -> None:
            # What is left of a length that uvicorn has not been told.
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_unframed)

    return run


def _cancel(timer: Timer | None) -> None:
    """Stops a clock that may be running; what it returns says that none is."""
    if timer is not None:
        timer.cancel()
