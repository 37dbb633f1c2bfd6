"""Limits of the HTTP server on clients and requests."""

import dataclasses
import math

from mor_jax.config.parsing import check, check_not_negative, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that hold for every request. Times in seconds, sizes in bytes.

    timeout: from a request's arrival to the end of generation; a request may set a shorter one.
    drain: for running requests to finish at shutdown. max_requests: running and waiting; more get
    429. max_body: of a request. max_prompts: in one request. max_choices: prompts times `n`.
    read_timeout: for the headers of a request to arrive, and for its body. write_timeout: for a
    client to read its response before the connection is closed. max_unsent: unsent events of one
    choice. keep_alive: for an idle connection. ping: of silence before a stream sends a comment.
    """

    timeout: float = 600.0
    drain: float = 30.0
    max_requests: int = 2048
    max_body: int = 2 * 2**20
    max_prompts: int = 64
    max_choices: int = 128
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    max_unsent: int = 1024
    # Longer than the idle timeout of nginx and cloud load balancers (60): the side that sends
    # requests must close first, or a request meets a connection that is just being closed.
    keep_alive: float = 75.0
    ping: float = 15.0

    def validate(self, path: str = "limits") -> None:
        """Raises `ValueError` on a limit out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rule = f"must be a number, at most {_MAX_VALUE:,}"
            ok = math.isfinite(value) and value <= _MAX_VALUE
            check(ok, f"{path}.{field.name}", value, rule, "Use a smaller value")
            if field.name == "drain":
                check_not_negative(path, self, field.name)
            else:
                check_positive(path, self, field.name)


_MAX_VALUE = 10**9
"""Upper bound of every limit; system timers overflow beyond it."""

MAX_STOPS = 16
"""Most stop strings, and most stop tokens, of a request."""

MAX_STOP_LENGTH = 512
"""Most characters of a stop string; as many are held back while a response streams."""

MAX_HEAD = 64 * 2**10
"""Most bytes of a request line with its headers."""

SEND_BUFFER = 256 * 2**10
"""Socket send buffer in bytes, for a client that does not read."""
