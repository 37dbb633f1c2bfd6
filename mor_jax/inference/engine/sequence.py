"""A request in the engine: its state on the host."""

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

    sink: called with every event. output_tokens: sampled so far. slot, blocks: None while it waits.
    prefilled: tokens sent to the device for prefill. decoding: prefill is complete. epoch: number
    of restarts; results of an earlier epoch are ignored. min_capacity_tokens: entries that KV lists
    turned out to need beyond their reservation. counts: entries of its KV lists as last read.
    admission_order: smaller is older. arrival_time, first_scheduled_time, first_token_time: seconds
    of the monotonic clock. cancelled: read and written by several threads.
    """

    request: Request
    sink: Sink
    seed: int
    text: TextStream
    arrival_time: float = dataclasses.field(default_factory=time.monotonic)
    output_tokens: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    blocks: BlockLists | None = None
    prefilled: int = 0
    decoding: bool = False
    epoch: int = 0
    min_capacity_tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    counts: np.ndarray | None = None
    admission_order: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    cancelled: bool = False
    finished: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and output tokens."""
        return [*self.request.prompt, *self.output_tokens]

    @property
    def max_length(self) -> int:
        """Most tokens that it can have, prompt and output together."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def past_deadline(self) -> bool:
        """Whether its deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and time.monotonic() - self.arrival_time > deadline

    def restart(self) -> None:
        """Gives up slot and pages; prefill starts again."""
        self.slot, self.blocks, self.counts = None, None, None
        self.rewind(0)

    def rewind(self, prefilled: int) -> None:
        """Continues prefill at token `prefilled`."""
        self.prefilled, self.decoding, self.epoch = prefilled, False, self.epoch + 1

    def append_token(self, token: int, details: dict[str, object]) -> Reason | None:
        """Appends a sampled token and emits it; returns the finish reason if it is the last one.

        details: log-probabilities and depth, fields of `Token`.
        """
        request = self.request
        if token in request.stop_tokens:
            return "stop"
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
        self.output_tokens.append(token)
        text, stopped = self.text.push(token)
        index, offset = len(self.output_tokens) - 1, self.text.offset
        self._emit(Token(index=index, id=token, text=text, offset=offset, **details))
        if stopped:
            return "stop"
        return "length" if len(self.output_tokens) >= request.max_tokens else None

    def finish(self, reason: Reason, message: str = "") -> None:
        """Emits the `Finished` event."""
        self.finished = True
        now = time.monotonic()
        first_token_seconds = (
            None if self.first_token_time is None else self.first_token_time - self.arrival_time
        )
        queue_seconds = (
            now if self.first_scheduled_time is None else self.first_scheduled_time
        ) - self.arrival_time
        self._emit(
            Finished(
                reason=reason,
                text=self.text.finish(),
                prompt_tokens=len(self.request.prompt),
                tokens=len(self.output_tokens),
                message=message,
                first_token_seconds=first_token_seconds,
                seconds=now - self.arrival_time,
                queue_seconds=queue_seconds,
            )
        )

    def _emit(self, event: Event) -> None:
        """Passes an event to the sink. If the sink fails, only this request is cancelled."""
        try:
            self.sink(event)
        except Exception:
            _log.exception("a sink raised an exception; its request is cancelled")
            self.cancelled = True
