"""A request on its way through the engine, as the host knows it."""

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np

from mor_jax.inference.detokenizer import TextStream
from mor_jax.inference.engine.block_pool import BlockLists
from mor_jax.inference.engine.request import Event, Finished, Reason, Request, Token

_log = logging.getLogger(__name__)

Sink = Callable[[Event], None]


@dataclasses.dataclass(eq=False)
class Sequence:
    """One request.

    answer: tokens sampled so far. slot, held: where it runs, None while it waits. stored: tokens
    that have been sent to be stored. decodes: its last token was sent after them. epoch: counts its
    fresh starts; what the device still answers to an earlier one is ignored. needs: entries that
    lists turned out to need, beyond what they reserve. counts: entries of its lists as last seen.
    born, placed, first_token: when it was submitted, first got a slot, and had its first token.
    cancelled: somebody wants it ended; read and written by several threads.
    """

    request: Request
    sink: Sink
    seed: int
    text: TextStream
    born: float = dataclasses.field(default_factory=time.monotonic)
    answer: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    held: BlockLists | None = None
    stored: int = 0
    decodes: bool = False
    epoch: int = 0
    needs: dict[int, int] = dataclasses.field(default_factory=dict)
    counts: np.ndarray | None = None
    order: int = 0
    placed: float | None = None
    first_token: float | None = None
    cancelled: bool = False
    done: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt, *self.answer]

    @property
    def length(self) -> int:
        """Tokens that it holds in the end."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def late(self) -> bool:
        """Whether its deadline is over."""
        deadline = self.request.deadline
        return deadline is not None and time.monotonic() - self.born > deadline

    def restart(self) -> None:
        """Back to the queue: everything has to be stored again."""
        self.slot, self.held, self.counts = None, None, None
        self.rewind(0)

    def rewind(self, stored: int) -> None:
        """Continues to store tokens at number `stored`."""
        self.stored, self.decodes, self.epoch = stored, False, self.epoch + 1

    def says(self, token: int, about: dict[str, object]) -> Reason | None:
        """Takes a sampled token and tells it; the reason if it is the last one.

        about: log-probabilities and depth, members of `Token`.
        """
        request = self.request
        if token in request.stop_tokens:
            return "stop"
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.answer.append(token)
        text, stopped = self.text.push(token)
        index, offset = len(self.answer) - 1, self.text.offset
        self._tell(Token(index=index, id=token, text=text, offset=offset, **about))
        if stopped:
            return "stop"
        return "length" if len(self.answer) >= request.max_tokens else None

    def ends(self, reason: Reason, message: str = "") -> None:
        """Tells the end."""
        self.done = True
        now = time.monotonic()
        first = None if self.first_token is None else self.first_token - self.born
        queued = (now if self.placed is None else self.placed) - self.born
        self._tell(
            Finished(
                reason=reason,
                text=self.text.finish(),
                prompt_tokens=len(self.request.prompt),
                tokens=len(self.answer),
                message=message,
                first_token_seconds=first,
                seconds=now - self.born,
                queue_seconds=queued,
            )
        )

    def _tell(self, event: Event) -> None:
        """Hands an event over. Who cannot take it loses its answer; the others keep theirs."""
        try:
            self.sink(event)
        except Exception:
            _log.exception("a sink failed; its request is cancelled")
            self.cancelled = True
