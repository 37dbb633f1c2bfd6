"""What the server grants a client, in one place, and how it listens."""

import dataclasses
import math

from mor_jax.config.parsing import check, check_not_negative, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that hold for every request. Times in seconds, sizes in bytes.

    timeout: until an answer is cut off, from when its request was read; a request may ask for less,
    never for more. drain: that answers under way are given when the server is told to stop.
    max_requests: at work or waiting at once; more are turned away. max_body: of a request.
    max_prompts: texts in one request. max_choices: prompts times `n`. read_timeout: for the head of
    a request to arrive, and for its body. write_timeout: that a client may leave its answer unread
    before it is cut off. max_unsent: events of one choice that may wait to be written. keep_alive:
    that a connection may idle. ping: of silence after which a stream carries a comment.
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
    # Longer than nginx and the balancers of clouds keep idle connections (60): whoever closes first
    # must be the one that sends, or a request meets a connection that is just being closed.
    keep_alive: float = 75.0
    ping: float = 15.0

    def validate(self, path: str = "limits") -> None:
        """Raises `ValueError` on a bound that nothing could keep."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rule = f"must be a number, at most {_MOST:,}"
            ok = math.isfinite(value) and value <= _MOST
            check(ok, f"{path}.{field.name}", value, rule, "Give a smaller one")
            if field.name == "drain":
                check_not_negative(path, self, field.name)
            else:
                check_positive(path, self, field.name)


_MOST = 10**9
"""Of anything: seconds beyond it no clock of the system counts, and nobody means them."""

MAX_STOPS = 16
"""Stop texts and stop tokens that a request may give, of each kind."""

MAX_STOP_LENGTH = 512
"""Characters of a stop text: as many are held back while an answer streams."""

MAX_HEAD = 64 * 2**10
"""Bytes of a request line with its headers."""

SEND_BUFFER = 256 * 2**10
"""Bytes that the system holds for a client that does not read."""
