"""What every request passes: keys, the limit on requests at work, errors as JSON, one log line."""

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
from mor_jax.inference.server.responses import send_refusal

LOG = logging.getLogger("mor_jax.serve")

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")

# Not an HTTP status that anybody receives: the client had left. nginx writes the same.
_LEFT = 499


@dataclasses.dataclass
class Record:
    """What is known of a request, for the log and /metrics. Never any text of it.

    number: its id. status: 0 until the response begins. first: seconds to the first token.
    """

    number: str
    status: int = 0
    prompt_tokens: int | None = None
    tokens: int | None = None
    first: float | None = None
    reason: str = ""

    def line(self, endpoint: str, method: str, seconds: float) -> str:
        """`POST /v1/completions 200 1.234s id=... prompt=12 tokens=34 first=0.056s end=stop`."""
        out = f"{method} {endpoint} {self.status} {seconds:.3f}s id={self.number}"
        if self.prompt_tokens is not None:
            out += f" prompt={self.prompt_tokens} tokens={self.tokens or 0}"
        if self.first is not None:
            out += f" first={self.first:.3f}s"
        return f"{out} end={self.reason}" if self.reason else out


class Middleware:
    """An ASGI application around another one, which finds a `Record` and a `Body` in its scope.

    keys: those that open /v1, any if there are none. ends: whether the server is about to end.
    Paths outside of `ENDPOINTS` are turned away.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        measures: ServerMetrics,
        keys: Sequence[bytes],
        ends: Callable[[], bool],
    ) -> None:
        self._app, self._limits, self._measures = app, limits, measures
        self._keys, self._ends = tuple(keys), ends
        self.at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        record = Record(uuid.uuid4().hex)
        body = Body(receive, self._limits)
        state = scope.setdefault("state", {})
        state["record"], state["body"] = record, body
        self.at_work += 1
        self._measures.at_work.set(self.at_work)
        try:
            # Connections go when the server does: what is answered until then says so, and nobody
            # sends the next request into one that is just being closed.
            await self._answer(scope, receive, _closing(_noted(send, record), self._ends), body)
        except ConnectionError:
            record.status, record.reason = _LEFT, "left"
        finally:
            self.at_work -= 1
            self._measures.at_work.set(self.at_work)
            self._log(scope, record, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: Body) -> None:
        record: Record = scope["state"]["record"]
        try:
            self._check(scope)
            await self._app(scope, receive, send)
        except APIError as refusal:
            record.reason = record.reason or refusal.code or ""
            await self._refuse(refusal, send, body)
        except ConnectionError:
            raise
        except Exception:
            LOG.exception("request %s failed", record.number)
            record.reason = "error"
            if record.status:
                # Half an answer is out: the connection is cut, so that nobody takes it for whole.
                raise
            message = f"something went wrong here; the server's log has it under {record.number}"
            await self._refuse(APIError(500, message, code="internal_error"), send, body)

    async def _refuse(self, refusal: APIError, send: Send, body: Body) -> None:
        if refusal.status != 408:
            await body.skip()
        # The rest of the request is not read.
        await send_refusal(_closing(send, lambda: not body.whole), refusal)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        if path.startswith("/v1") and self._keys and not self._known(bearer(scope["headers"])):
            message = "no valid key. Send the header Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key")
        if self.at_work > self._limits.max_requests and path.startswith("/v1"):
            message = f"{self._limits.max_requests} requests are at work already. Try again later"
            raise APIError(429, message, code="busy", retry=1)

    def _known(self, key: bytes) -> bool:
        # All are compared, in constant time: how long it takes tells nothing about them.
        return any([hmac.compare_digest(key, known) for known in self._keys])

    def _log(self, scope: Scope, record: Record, seconds: float) -> None:
        path = scope["path"]
        if path.startswith("/v1/models/"):
            path = "/v1/models"
        endpoint = path if path in ENDPOINTS else "other"
        if record.status == 0:
            record.status = _LEFT
        self._measures.requests.labels(endpoint, str(record.status)).inc()
        if endpoint.startswith("/v1"):
            self._measures.whole.observe(seconds)
        # Probes come every few seconds and say nothing.
        level = logging.DEBUG if endpoint in ("/health", "/metrics") else logging.INFO
        LOG.log(level, record.line(endpoint, scope["method"], seconds))


def _noted(send: Send, record: Record) -> Send:
    """Notes the status, and names the request to its client."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            extra = (b"x-request-id", record.number.encode())
            message = {**message, "headers": [*message.get("headers", ()), extra]}
        try:
            await send(message)
        except RuntimeError as error:
            # uvloop's word for a connection that broke a moment ago, which nobody was told yet.
            if "closed" not in str(error):
                raise
            await asyncio.sleep(0)
            raise ConnectionResetError(str(error)) from error

    return noted


def _closing(send: Send, when: Callable[[], bool]) -> Send:
    """Ends the connection after a response that begins while `when()` holds."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start" and when():
            kept: list[Any] = [h for h in message.get("headers", ()) if h[0] != b"connection"]
            message = {**message, "headers": [*kept, (b"connection", b"close")]}
        await send(message)

    return closing
