"""One request at the engine: its answers as they come, and their end in every case."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from mor_jax.inference.engine.engine import Engine, Handle
from mor_jax.inference.engine.request import Finished, Request
from mor_jax.inference.server.errors import APIError, of_value_error
from mor_jax.inference.server.event_queue import EventQueue, EventQueues, Timed
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.metrics import ServerMetrics
from mor_jax.inference.server.output_processor import Choice

# Characters of an error of the engine's that a client is shown.
_MOST = 200


class Generation:
    """The answers to one HTTP request. Belongs to the event loop's thread.

    Whoever makes one calls `close` in the end, so that nothing is left at the engine when the
    request is gone. choices: in the order of `requests`. tokens: of all answers.
    first: seconds to the first token. worked: seconds that each finished answer had its slot.
    reason: why the first answer ended, or what ended all.
    """

    def __init__(
        self, engine: Engine, mailbox: EventQueues, limits: Limits, measures: ServerMetrics
    ):
        self._engine, self._mailbox, self._limits = engine, mailbox, limits
        self._measures = measures
        self._woken = asyncio.Event()
        self._boxes: list[EventQueue] = []
        self._handles: list[Handle | None] = []
        self._began = time.perf_counter()
        self._last: list[float] = []
        self._counts: list[int] = []
        self.choices: list[Choice] = []
        self.open = 0
        self.tokens = 0
        self.first: float | None = None
        self.worked: list[float] = []
        self._nothing = 0
        self.reason = ""

    def submit(self, requests: Sequence[Request], echoes: Sequence[str]) -> None:
        """Hands all of a request's texts to the engine, or none.

        Raises `Busy` or `Stopped` as the engine, `APIError` on what it finds wrong.
        """
        try:
            for i, (request, echo) in enumerate(zip(requests, echoes, strict=True)):
                box = EventQueue(self._limits.max_unsent, self._woken, self._unread)
                handle = self._engine.submit(request, sink=self._mailbox.sink(box))
                self._boxes.append(box)
                self._handles.append(handle)
                self.choices.append(Choice(i, len(request.prompt), echo, len(echo)))
        except ValueError as error:
            self.close("refused")
            raise of_value_error(error) from None
        except BaseException:
            self.close("refused")
            raise
        self.open = len(self.choices)
        self._last = [0.0] * self.open
        self._counts = [0] * self.open
        for request in requests:
            self._measures.prompt.observe(len(request.prompt))

    async def wait(self, seconds: float | None = None) -> bool:
        """Until something came, which is then in `choices`. False: nothing did in that time.

        Raises `APIError` if an answer cannot be completed.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        for i, box in enumerate(self._boxes):
            for timed in box.fetch():
                self._take(i, timed)
        if self.reason == "unread":
            raise APIError(408, "the answer was not read in time", code="unread")
        if self.reason == "stopped":
            raise _stopped()
        return True

    def leave(self) -> None:
        """The client has gone: gives all answers up and wakes who waits for them."""
        self.close("left")
        # Even of an answer that is finished: it was not read to its end.
        self.reason = "left"
        self._woken.set()

    def stop(self) -> None:
        """The server ends: gives all answers up; who waits for them is told."""
        self.close("stopped")
        self._woken.set()

    def close(self, reason: str) -> None:
        """Cancels what is not finished; events that still come are dropped. May be called again."""
        self.reason = self.reason or reason
        for i, handle in enumerate(self._handles):
            if handle is not None:
                handle.cancel()
                self._handles[i] = None
                self._measures.ended.labels(reason).inc()
        for box in self._boxes:
            box.close()
        self.open = 0

    def _unread(self) -> None:
        self.close("unread")

    def _take(self, i: int, timed: Timed) -> None:
        event, when = timed
        if isinstance(event, Finished):
            self._finish(i, event)
            return
        if self._counts[i]:
            self._measures.gap.observe(when - self._last[i])
        else:
            waited = when - self._began
            self._measures.first_token.observe(waited)
            self.first = waited if self.first is None else self.first
        self._last[i] = when
        self._counts[i] += 1
        self.tokens += 1
        self.choices[i].tokens.append(event)

    def _finish(self, i: int, event: Finished) -> None:
        self.open -= 1
        self._handles[i] = None
        self.choices[i].finished = event
        self._measures.ended.labels(event.reason).inc()
        self._measures.answer.observe(event.tokens)
        self.reason = self.reason or event.reason
        self.worked.append(event.seconds - event.queue_seconds)
        self._nothing += event.reason == "deadline" and event.tokens == 0
        # What the others have is given, with this one empty.
        late = self._nothing == len(self.choices)
        wrong = _late() if late else _refusal(event)
        if wrong is not None:
            self.close(event.reason)
            raise wrong


def _refusal(event: Finished) -> APIError | None:
    """What a client is told of an answer that broke off; None for one that came to its end."""
    if event.reason == "error":
        # The rest of a long message is for the log, which has it.
        message = event.message.partition("\n")[0][:_MOST] or "the answer failed"
        return APIError(500, message, code="engine_error")
    if event.reason == "cancelled":
        return _stopped()
    return None


def _late() -> APIError:
    message = "timeout: no token was generated in time, the server is busy"
    return APIError(504, message, param="timeout", code="deadline")


def _stopped() -> APIError:
    return APIError(503, "the server is shutting down", code="stopped", retry=5)


async def until_gone(receive: Any) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
