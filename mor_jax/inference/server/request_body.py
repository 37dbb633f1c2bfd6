"""Reads the body of a request within limits of size and time."""

import asyncio
from collections.abc import Iterable

from starlette.types import Receive, Scope

from mor_jax.inference.server.errors import APIError
from mor_jax.inference.server.limits import Limits

# Seconds, and multiples of the size limit, for which a rejected body is still read: closing a
# connection while the client still sends would lose the response.
_PATIENCE = 2.0
_PATIENCE_SIZE = 16


class Body:
    """Reads the body once. complete: all of it has been received."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self.complete = False

    async def read(self, scope: Scope) -> bytes:
        """The body of a JSON request.

        Raises `APIError` (wrong type, too large, too slow), `ConnectionError` on a disconnect.
        """
        _check_headers(dict(scope["headers"]), self._limits.max_body)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.read_timeout):
                while not self.complete:
                    parts.append(await self._next())
                    size += len(parts[-1])
                    if size > self._limits.max_body:
                        raise _too_large(self._limits.max_body)
        except TimeoutError:
            seconds = self._limits.read_timeout
            message = f"the request did not arrive within {seconds:g} seconds"
            raise APIError(408, message, code="slow_request") from None
        return b"".join(parts)

    async def discard(self) -> None:
        """Reads and discards the rest, within limits."""
        left = _PATIENCE_SIZE * self._limits.max_body
        try:
            async with asyncio.timeout(_PATIENCE):
                while not self.complete and left > 0:
                    left -= len(await self._next())
        except TimeoutError:
            return

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client disconnected while sending its request")
        self.complete = not message.get("more_body", False)
        return message.get("body", b"")


def _check_headers(headers: dict[bytes, bytes], max_bytes: int) -> None:
    content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    # Also protects from other web sites: browsers need permission to send this type cross-origin.
    if content_type != b"application/json":
        message = "the body must be JSON. Send the header Content-Type: application/json"
        raise APIError(415, message, code="not_json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise APIError(
            415, "compressed bodies are not supported. Send it uncompressed", code="compressed"
        )
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> APIError:
    message = f"the request's body is larger than {max_bytes} bytes. Send a smaller one"
    return APIError(413, message, code="too_large")


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key of `Authorization: Bearer KEY`, empty where there is none."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return b""
