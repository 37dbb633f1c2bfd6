"""HTTP/1.1 connections with limits on what a client may send and leave unread.

An ASGI application cannot see a request line that never ends, nor close a connection whose client
has stopped reading. uvicorn leaves both open for ever, so its protocol is extended here.
"""

import socket
from typing import Any, Protocol, runtime_checkable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mor_jax.inference.server.limits import MAX_HEAD, Limits

# Requests that a client may pipeline.
_MAX_PIPELINED = 16

# The first bytes of every response.
_STATUS_LINE_START = b"HTTP/1.1 "

# A comment of an event stream, which clients ignore.
_COMMENT = b":\n\n"

# Seconds between two probes of a half-closed connection.
_PROBE_SECONDS = 0.05


@runtime_checkable
class Timer(Protocol):
    """The return value of `call_later`, whose class depends on the event loop."""

    def cancel(self) -> None:
        """Stops the timer."""


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with time limits. `limited_protocol` creates the class for uvicorn."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._cycles: list[RequestResponseCycle] = []
        self._head_timer: Timer | None = None
        self._write_timer: Timer | None = None
        # Runs while the client sends no more but may still read.
        self._probe_timer: Timer | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the timer for the first request line."""
        super().connection_made(transport)
        # By default asyncio buffers 64 kB without calling `pause_writing`, and the timer for a
        # client that does not read would never start.
        transport.set_write_buffer_limits(high=0)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Rejects headers that are too long."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            # The next request has begun: its first bytes ended the keep-alive time.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.send_400_response("The request's headers are too long.")
            elif self._head_timer is None:
                self._start_head_timer()
        else:
            self._head_bytes = 0
            self._head_timer = _cancel(self._head_timer)

    def on_headers_complete(self) -> None:
        """Registers the request: several may be open at once."""
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= _MAX_PIPELINED:
            # uvicorn stops reading while a request waits for an earlier response, and would not
            # notice that the client disconnects.
            self.flow.resume_reading()
        self._cycles = [*self._open_cycles(), self.cycle]

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers and notifies every open request; uvicorn notifies only the last."""
        self._head_timer, self._write_timer = _cancel(self._head_timer), _cancel(self._write_timer)
        self._probe_timer = _cancel(self._probe_timer)
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles = []

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more; it may still wait for a response. True keeps the connection.

        A client that has disconnected looks the same until it receives data, which it rejects. So a
        few bytes of the response are sent ahead.
        """
        open_cycles = self._open_cycles()
        if not open_cycles or open_cycles[-1].more_body or self.transport.is_closing():
            return False
        if self._probe_timer is None:
            _send_ahead(open_cycles[0])
            self._probe_timer = self.loop.call_later(_PROBE_SECONDS, self._probe)
        return True

    def on_response_complete(self) -> None:
        """Closes the connection if no request can follow."""
        super().on_response_complete()
        if (
            self._probe_timer is not None
            and not self._open_cycles()
            and not self.transport.is_closing()
        ):
            self.transport.close()

    def pause_writing(self) -> None:
        """Starts the write timer: the client does not read."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self.limits.write_timeout, self.transport.abort
            )

    def resume_writing(self) -> None:
        """Stops the write timer: the client has read."""
        self._write_timer = _cancel(self._write_timer)
        super().resume_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        is_http_1_0 = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _without_chunking(cycle, app) if is_http_1_0 else app)

    def _open_cycles(self) -> list[RequestResponseCycle]:
        """Requests whose responses are not complete, oldest first."""
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _probe(self) -> None:
        self._probe_timer = self.loop.call_later(_PROBE_SECONDS, self._probe)
        sock = self.transport.get_extra_info("socket")
        # asyncio no longer reads from this connection, so it does not report the error itself.
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.read_timeout, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def limited_protocol(limits: Limits) -> type[LimitedProtocol]:
    """The protocol class with these limits."""
    return type("Protocol", (LimitedProtocol,), {"limits": limits})


class _StartedTransport:
    """Transport of a response whose first bytes are already sent: skips them in the first write."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport

    def write(self, data: bytes) -> None:
        """Writes the rest of the status line, and restores the original transport."""
        self._cycle.transport = self._transport
        self._transport.write(data.removeprefix(_STATUS_LINE_START))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _send_ahead(cycle: RequestResponseCycle) -> None:
    """Sends a few bytes that the response starts with, or that its client ignores."""
    if not cycle.response_started:
        cycle.transport.write(_STATUS_LINE_START)
        cycle.transport = _StartedTransport(cycle)  # type: ignore[assignment]
    elif cycle.chunked_encoding:
        # Only event streams are chunked.
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(_COMMENT), _COMMENT))


def _without_chunking(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """The application for HTTP/1.0, which has no chunked encoding: the response is sent as it is
    and ends with the connection."""
    cycle.chunked_encoding = False

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unframed(message: Message) -> None:
            # uvicorn checks every body against an expected length, which is unknown here.
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_unframed)

    return run


def _cancel(timer: Timer | None) -> None:
    """Cancels a timer if there is one; returns None."""
    if timer is not None:
        timer.cancel()
