"""The server process: its socket, signals and shutdown."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from mor_jax.config.parsing import check, fail
from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.server.app import ApiApp
from mor_jax.inference.server.connection import limited_protocol
from mor_jax.inference.server.limits import SEND_BUFFER, Limits
from mor_jax.runtime import exit_codes
from mor_jax.runtime.preemption import REPEAT_SECONDS

LOG = logging.getLogger("mor_jax.serve")

# Seconds for the last responses to reach their clients, and for an engine that does not stop.
_FLUSH_SECONDS = 5
_STOP_MARGIN_SECONDS = 10.0

# Connections that wait to be accepted: a thousand clients may connect at the same moment.
_BACKLOG = 4096

# Python's thread switch interval in seconds. With the default of 5 ms the event loop could delay
# every decode step by as much.
_SWITCH_INTERVAL = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet; port 0 takes a free port.

    Raises `ValueError` if the address is unknown or in use.
    """
    rule = "must be in 0 .. 65535"
    check(0 <= port <= 65535, "port", port, rule, "Try 8000; 0 takes any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        fail("host", host, f"unknown address ({error})", "Try 127.0.0.1, or 0.0.0.0 for all")
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        bound.bind(address)
    except OSError as error:
        bound.close()
        rule = f"cannot listen on {host} ({error.strerror})"
        fail("port", port, rule, "Use another port; 0 takes any that is free")
    return bound


def address(bound: socket.socket) -> str:
    """The URL of a bound socket, such as `http://127.0.0.1:8000`."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until `stop`, SIGTERM, SIGINT or a failure of the engine.

    The engine first finishes running requests (`Limits.drain`), while new ones get 503. A second
    signal cancels them. ready: called once clients can connect. code: exit code of the process.
    engine_hangs: the engine did not stop in time.
    """

    def __init__(
        self, api: ApiApp, engine: Engine, limits: Limits, ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            api.app,
            http=limited_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        super().__init__(config)
        self._api, self._engine, self._limits, self._ready = api, engine, limits, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._last_signal = -REPEAT_SECONDS
        self.code, self.engine_hangs = exit_codes.OK, False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's signal handling, which drops running requests."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        for signum in previous:
            self._loop.add_signal_handler(signum, self._on_signal, signal.Signals(signum).name)
        try:
            yield
        finally:
            for signum, handler in previous.items():
                self._loop.remove_signal_handler(signum)
                # The process is about to exit: another signal must not change its exit code.
                signal.signal(signum, signal.SIG_IGN if self._draining else handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then calls `ready`."""
        await super().startup(sockets)
        self._ready()

    def stop(self) -> None:
        """The same as SIGTERM. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._request_stop, "stop")

    async def on_tick(self, counter: int) -> bool:
        """Whether to exit now; uvicorn calls it ten times a second."""
        if self._engine.failure and self._draining is None:
            LOG.error("the engine failed: %s", self._engine.failure)
            self.code = exit_codes.ERROR
            self._request_stop("failure")
        return await super().on_tick(counter)

    def _on_signal(self, name: str) -> None:
        now = time.monotonic()
        if now - self._last_signal >= REPEAT_SECONDS:
            self._request_stop(name)
        self._last_signal = now

    def _request_stop(self, reason: str) -> None:
        if self._draining is not None:
            LOG.warning("%s again: cancelling the running requests", reason)
            self._api.cancel_all()
            return
        LOG.warning("%s: finishing the running requests, for %g s", reason, self._limits.drain)
        self._api.draining = "the server is shutting down"
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            try:
                self._engine.stop(drain=True, timeout=self._limits.drain)
            finally:
                loop.call_soon_threadsafe(done.set)

        # A daemon thread: an engine that hangs must not keep the process alive.
        threading.Thread(target=stop, name="drain", daemon=True).start()
        try:
            async with asyncio.timeout(self._limits.drain + _STOP_MARGIN_SECONDS):
                await done.wait()
        except TimeoutError:
            LOG.error("the engine does not stop: exiting without it")
            self.code, self.engine_hangs = exit_codes.ERROR, True
            self._api.cancel_all()
        self.should_exit = True


def run(server: Server, bound: socket.socket) -> int:
    """Serves on that socket until the server ends; returns the exit code."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    _raise_file_limit()
    server.run(sockets=[bound])
    if server.engine_hangs:
        # The engine's thread waits for a device that does not respond, and cannot be joined.
        logging.shutdown()
        os._exit(server.code)
    return server.code


def _raise_file_limit() -> None:
    """Raises the limit on open files, often 1,024, because each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
