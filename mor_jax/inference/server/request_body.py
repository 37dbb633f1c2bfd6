"""The body of a request, read within bounds of size and time."""

import asyncio
from collections.abc import Iterable

from starlette.types import Receive, Scope

from mor_jax.inference.server.errors import APIError
from mor_jax.inference.server.limits import Limits

# Seconds, and multiples of the allowed size, for which a body that is turned away is still read:
# a connection that is closed on a client that still sends loses the answer on its way.
_PATIENCE = 2.0
_PATIENCE_SIZE = 16


class Body:
    """Reads what the client sends, once. whole: nothing more comes."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self.whole = False

    async def read(self, scope: Scope) -> bytes:
        """The body of a JSON request.

        Raises `APIError` (another type, too large, too slow), `ConnectionError` if the client goes.
        """
        _check_headers(dict(scope["headers"]), self._limits.max_body)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.read_timeout):
                while not self.whole:
                    parts.append(await self._next())
                    size += len(parts[-1])
                    if size > self._limits.max_body:
                        raise _too_large(self._limits.max_body)
        except TimeoutError:
            seconds = self._limits.read_timeout
            message = f"the request did not arrive within {seconds:g} seconds"
            raise APIError(408, message, code="slow_request") from None
        return b"".join(parts)

    async def skip(self) -> None:
        """Reads what is left and forgets it, for a while."""
        left = _PATIENCE_SIZE * self._limits.max_body
        try:
            async with asyncio.timeout(_PATIENCE):
                while not self.whole and left > 0:
                    left -= len(await self._next())
        except TimeoutError:
            return

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left while it sent its request")
        self.whole = not message.get("more_body", False)
        return message.get("body", b"")


def _check_headers(headers: dict[bytes, bytes], most: int) -> None:
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    # Also keeps web pages of others away: browsers ask before they send this type elsewhere.
    if kind != b"application/json":
        message = "the body must be JSON. Send the header Content-Type: application/json"
        raise APIError(415, message, code="not_json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise APIError(415, "compressed bodies are not read. Send it as it is", code="compressed")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> APIError:
    message = f"the request's body is larger than {most} bytes. Send less at once"
    return APIError(413, message, code="too_large")


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key of `Authorization: Bearer KEY`, empty where there is none."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return b""
