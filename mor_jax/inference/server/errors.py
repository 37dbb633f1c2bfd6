"""Errors in the format of OpenAI's API."""

import json
import math
import re
from typing import Any, NoReturn

from mor_jax.inference.engine.request import Busy, Stopped

# Most characters of a value in a message.
_MAX_SHOWN = 80

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class APIError(Exception):
    """An error response with its HTTP status.

    param: the invalid field of the request. code: a machine-readable name. retry_after: seconds
    until a retry makes sense. allow: methods of the path.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        error_type = _ERROR_TYPES.get(self.status, "server_error")
        error = {
            "message": self.message,
            "type": error_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def encoded(self) -> bytes:
        """`body` as UTF-8."""
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        out = {"content-type": "application/json"}
        if self.retry_after is not None:
            out["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.allow is not None:
            out["allow"] = self.allow
        if self.status == 401:
            out["www-authenticate"] = "Bearer"
        if self.status in (408, 413):
            # The rest of the body is not read, so no request may follow on this connection.
            out["connection"] = "close"
        if self.retry_after is not None:
            # A kept connection would have to outlive the wait. Otherwise the retry may be written
            # into a connection that is just being closed, and the client cannot know whether it
            # was read. With a new connection there is no such race, a full server holds no idle
            # connections, and a load balancer may choose another server.
            out["connection"] = "close"
        return out


def shorten(value: Any) -> str:
    """A value for a message: on one line, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def raise_error(
    param: str, value: Any, rule: str, fix: str, *, code: str | None = None, status: int = 400
) -> NoReturn:
    """Raises the `APIError` of one field: name, value, rule, fix."""
    message = f"{param}={shorten(value)}: {rule}. {fix}"
    raise APIError(status, message, param=param, code=code or "invalid_value")


def require(ok: bool, param: str, value: Any, rule: str, fix: str) -> None:
    """Raises `APIError` unless `ok`."""
    if not ok:
        raise_error(param, value, rule, fix)


# Matches the engine's setting names: `request.sampling.top_p=2: ...`, `request.prompt[3]=...`.
_PATH = re.compile(r"^(?:request\.)?(?:sampling\.)?(\w+)(?=[\[=.])")


def from_value_error(error: ValueError) -> APIError:
    """The error for a request that the engine rejects."""
    message = str(error)
    found = _PATH.match(message)
    message = re.sub(r"^(?:request\.)?(?:sampling\.)?", "", message)
    return APIError(400, message, param=found[1] if found else None, code="invalid_value")


def from_busy(error: Busy, retry_after: float) -> APIError:
    """The error for a request that meets a full queue."""
    return APIError(
        429,
        str(error) or "the queue is full. Try again later",
        code="busy",
        retry_after=retry_after,
    )


def from_stopped(error: Stopped) -> APIError:
    """The error for a request during shutdown."""
    message = str(error) or "the server is shutting down"
    return APIError(503, message, code="stopped", retry_after=5)
