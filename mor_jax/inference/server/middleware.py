"""ASGI middleware: API keys, the limit on concurrent requests, JSON errors, the access log."""

import asyncio
import dataclasses
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor_jax.inference.server.errors import APIError
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.metrics import ServerMetrics
from mor_jax.inference.server.request_body import Body, bearer
from mor_jax.inference.server.responses import send_error

LOG = logging.getLogger("mor_jax.serve")

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")

# Status in log and metrics if the client closed the connection; nginx uses the same.
_CLIENT_CLOSED_REQUEST = 499


@dataclasses.dataclass
class RequestRecord:
    """Facts about a request for the log and /metrics. Never any of its text.

    status: 0 until the response starts.
    """

    request_id: str
    status: int = 0
    prompt_tokens: int | None = None
    tokens: int | None = None
    first_token_seconds: float | None = None
    reason: str = ""

    def line(self, endpoint: str, method: str, seconds: float) -> str:
        """`POST /v1/completions 200 1.234s id=... prompt=12 tokens=34 first=0.056s end=stop`."""
        out = f"{method} {endpoint} {self.status} {seconds:.3f}s id={self.request_id}"
        if self.prompt_tokens is not None:
            out += f" prompt={self.prompt_tokens} tokens={self.tokens or 0}"
        if self.first_token_seconds is not None:
            out += f" first={self.first_token_seconds:.3f}s"
        return f"{out} end={self.reason}" if self.reason else out


class Middleware:
    """Wraps an ASGI application and puts a `RequestRecord` and a `Body` into its scope.

    keys: API keys for /v1; empty: none needed. is_draining: whether the server is shutting down.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: ServerMetrics,
        keys: Sequence[bytes],
        is_draining: Callable[[], bool],
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys, self._is_draining = tuple(keys), is_draining
        self.in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return
        start = time.perf_counter()
        record = RequestRecord(uuid.uuid4().hex)
        body = Body(receive, self._limits)
        state = scope.setdefault("state", {})
        state["record"], state["body"] = record, body
        self.in_progress += 1
        self._metrics.in_progress.set(self.in_progress)
        try:
            # During shutdown every response closes its connection, so that no client sends the
            # next request into a connection that is just being closed.
            await self._handle(
                scope, receive, _closing(_with_request_id(send, record), self._is_draining), body
            )
        except ConnectionError:
            record.status, record.reason = _CLIENT_CLOSED_REQUEST, "left"
        finally:
            self.in_progress -= 1
            self._metrics.in_progress.set(self.in_progress)
            self._log(scope, record, time.perf_counter() - start)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, body: Body) -> None:
        record: RequestRecord = scope["state"]["record"]
        try:
            self._check(scope)
            await self._app(scope, receive, send)
        except APIError as error:
            record.reason = record.reason or error.code or ""
            await self._send_error(error, send, body)
        except ConnectionError:
            raise
        except Exception:
            LOG.exception("request %s failed", record.request_id)
            record.reason = "error"
            if record.status:
                # The response has started: cut the connection, so that it does not look complete.
                raise
            message = f"internal error; the server's log has details under {record.request_id}"
            await self._send_error(APIError(500, message, code="internal_error"), send, body)

    async def _send_error(self, error: APIError, send: Send, body: Body) -> None:
        if error.status != 408:
            await body.discard()
        # The rest of the request is not read.
        await send_error(_closing(send, lambda: not body.complete), error)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        if (
            path.startswith("/v1")
            and self._keys
            and not self._is_valid_key(bearer(scope["headers"]))
        ):
            message = "invalid or missing API key. Send the header Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key")
        if self.in_progress > self._limits.max_requests and path.startswith("/v1"):
            message = f"{self._limits.max_requests} requests are running already. Try again later"
            raise APIError(429, message, code="busy", retry_after=1)

    def _is_valid_key(self, key: bytes) -> bool:
        # Compares all keys in constant time, so that timing reveals nothing about them.
        return any([hmac.compare_digest(key, valid_key) for valid_key in self._keys])

    def _log(self, scope: Scope, record: RequestRecord, seconds: float) -> None:
        path = scope["path"]
        if path.startswith("/v1/models/"):
            path = "/v1/models"
        endpoint = path if path in ENDPOINTS else "other"
        if record.status == 0:
            record.status = _CLIENT_CLOSED_REQUEST
        self._metrics.requests.labels(endpoint, str(record.status)).inc()
        if endpoint.startswith("/v1"):
            self._metrics.request_duration.observe(seconds)
        # Health probes come every few seconds and would fill the log.
        level = logging.DEBUG if endpoint in ("/health", "/metrics") else logging.INFO
        LOG.log(level, record.line(endpoint, scope["method"], seconds))


def _with_request_id(send: Send, record: RequestRecord) -> Send:
    """Records the status, and adds the header x-request-id."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            extra = (b"x-request-id", record.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), extra]}
        try:
            await send(message)
        except RuntimeError as error:
            # uvloop raises this for a connection that was lost a moment ago.
            if "closed" not in str(error):
                raise
            await asyncio.sleep(0)
            raise ConnectionResetError(str(error)) from error

    return send_with_id


def _closing(send: Send, condition: Callable[[], bool]) -> Send:
    """Closes the connection after a response that starts while `condition()` is true."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start" and condition():
            headers: list[Any] = [h for h in message.get("headers", ()) if h[0] != b"connection"]
            message = {**message, "headers": [*headers, (b"connection", b"close")]}
        await send(message)

    return closing
