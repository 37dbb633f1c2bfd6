"""Requests that are turned away, in the form that clients of OpenAI's API read."""

import json
import math
import re
from typing import Any, NoReturn

from mor_jax.inference.engine.request import Busy, Stopped

# Most of a value that a message repeats.
_SHOWN = 80

_KINDS = {
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
    """Why a request is not answered, and with which HTTP status.

    param: the member of the request that is wrong. code: a short name for programs. retry: seconds
    after which another attempt makes sense. allow: methods that the path has.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry, self.allow = retry, allow

    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = _KINDS.get(self.status, "server_error")
        inside = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": inside}

    def encoded(self) -> bytes:
        """`body` as UTF-8."""
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        """Those that belong to the status."""
        out = {"content-type": "application/json"}
        if self.retry is not None:
            out["retry-after"] = str(max(1, math.ceil(self.retry)))
        if self.allow is not None:
            out["allow"] = self.allow
        if self.status == 401:
            out["www-authenticate"] = "Bearer"
        if self.status in (408, 413):
            # What is left of the body is not read, so nothing may follow on this connection.
            out["connection"] = "close"
        if self.retry is not None:
            # A kept connection would have to outlive the wait, or a client that comes back as told
            # writes into one that is just being closed, and cannot know whether its request was
            # read. Pools of clients and proxies open another one instead: free of that race
            # whatever the times are, no burden on a full server meanwhile, and behind a balancer
            # of connections the way to another server.
            out["connection"] = "close"
        return out


def shown(value: Any) -> str:
    """A value as a message repeats it: on one line, and shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def raise_error(
    param: str, value: Any, rule: str, fix: str, *, code: str | None = None, status: int = 400
) -> NoReturn:
    """Raises the `APIError` of one member: name, value, rule, way out."""
    message = f"{param}={shown(value)}: {rule}. {fix}"
    raise APIError(status, message, param=param, code=code or "invalid_value")


def require(ok: bool, param: str, value: Any, rule: str, fix: str) -> None:
    """Refuses the request unless `ok`."""
    if not ok:
        raise_error(param, value, rule, fix)


# `request.sampling.top_p=2: ...` and `request.prompt[3]=...`: what the engine calls its settings.
_PATH = re.compile(r"^(?:request\.)?(?:sampling\.)?(\w+)(?=[\[=.])")


def of_value_error(error: ValueError) -> APIError:
    """The refusal of what the engine found wrong with a request."""
    message = str(error)
    found = _PATH.match(message)
    message = re.sub(r"^(?:request\.)?(?:sampling\.)?", "", message)
    return APIError(400, message, param=found[1] if found else None, code="invalid_value")


def of_busy(error: Busy, retry: float) -> APIError:
    """The refusal of a request that finds the queue full."""
    return APIError(
        429, str(error) or "the queue is full. Try again later", code="busy", retry=retry
    )


def of_stopped(error: Stopped) -> APIError:
    """The refusal of a request that comes while the server ends."""
    message = str(error) or "the server is shutting down"
    return APIError(503, message, code="stopped", retry=5)
