"""Runs one HTTP request on the engine: collects its choices, and cancels them in every case."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from mor_jax.inference.engine.engine import Engine, Handle
from mor_jax.inference.engine.request import Finished, Request
from mor_jax.inference.server.errors import APIError, from_value_error
from mor_jax.inference.server.event_queue import EventDispatcher, EventQueue, TimedEvent
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.metrics import ServerMetrics
from mor_jax.inference.server.output_processor import Choice

# Most characters of an engine error in a response.
_MAX_MESSAGE = 200


class Generation:
    """The choices of one HTTP request. Used by the event loop's thread only.

    The caller must call `close`, so that no sequence outlives the request. choices: in the order of
    `requests`. open: unfinished choices. tokens: of all choices. slot_seconds: time in the slot of
    each finished choice. reason: why the first choice finished, or what ended all.
    """

    def __init__(
        self, engine: Engine, dispatcher: EventDispatcher, limits: Limits, metrics: ServerMetrics
    ):
        self._engine, self._dispatcher, self._limits = engine, dispatcher, limits
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._event_queues: list[EventQueue] = []
        self._handles: list[Handle | None] = []
        self._start = time.perf_counter()
        self._last_token: list[float] = []
        self._counts: list[int] = []
        self.choices: list[Choice] = []
        self.open = 0
        self.tokens = 0
        self.first_token_seconds: float | None = None
        self.slot_seconds: list[float] = []
        self._empty_timeouts = 0
        self.reason = ""

    def submit(self, requests: Sequence[Request], echoes: Sequence[str]) -> None:
        """Submits all requests to the engine, or none.

        Raises `Busy` or `Stopped` like the engine, and `APIError` for an invalid request.
        """
        try:
            for i, (request, echo) in enumerate(zip(requests, echoes, strict=True)):
                event_queue = EventQueue(self._limits.max_unsent, self._wake, self._on_unread)
                handle = self._engine.submit(request, sink=self._dispatcher.sink(event_queue))
                self._event_queues.append(event_queue)
                self._handles.append(handle)
                self.choices.append(Choice(i, len(request.prompt), echo, len(echo)))
        except ValueError as error:
            self.close("refused")
            raise from_value_error(error) from None
        except BaseException:
            self.close("refused")
            raise
        self.open = len(self.choices)
        self._last_token = [0.0] * self.open
        self._counts = [0] * self.open
        for request in requests:
            self._metrics.prompt_tokens.observe(len(request.prompt))

    async def wait(self, seconds: float | None = None) -> bool:
        """Waits for events and adds them to `choices`; False if none arrived within `seconds`.

        Raises `APIError` if a choice cannot be completed.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        for i, event_queue in enumerate(self._event_queues):
            for timed_event in event_queue.fetch():
                self._handle_event(i, timed_event)
        if self.reason == "unread":
            raise APIError(408, "the client did not read the response in time", code="unread")
        if self.reason == "stopped":
            raise _stopped_error()
        return True

    def disconnect(self) -> None:
        """The client disconnected: cancels all choices and wakes `wait`."""
        self.close("left")
        # Even after all choices finished: the response was not read to its end.
        self.reason = "left"
        self._wake.set()

    def stop(self) -> None:
        """The server stops: cancels all choices; `wait` raises."""
        self.close("stopped")
        self._wake.set()

    def close(self, reason: str) -> None:
        """Cancels unfinished choices and drops their later events. Idempotent."""
        self.reason = self.reason or reason
        for i, handle in enumerate(self._handles):
            if handle is not None:
                handle.cancel()
                self._handles[i] = None
                self._metrics.finish_reasons.labels(reason).inc()
        for event_queue in self._event_queues:
            event_queue.close()
        self.open = 0

    def _on_unread(self) -> None:
        self.close("unread")

    def _handle_event(self, i: int, timed_event: TimedEvent) -> None:
        event, when = timed_event
        if isinstance(event, Finished):
            self._finish(i, event)
            return
        if self._counts[i]:
            self._metrics.time_between_tokens.observe(when - self._last_token[i])
        else:
            elapsed = when - self._start
            self._metrics.time_to_first_token.observe(elapsed)
            self.first_token_seconds = (
                elapsed if self.first_token_seconds is None else self.first_token_seconds
            )
        self._last_token[i] = when
        self._counts[i] += 1
        self.tokens += 1
        self.choices[i].tokens.append(event)

    def _finish(self, i: int, event: Finished) -> None:
        self.open -= 1
        self._handles[i] = None
        self.choices[i].finished = event
        self._metrics.finish_reasons.labels(event.reason).inc()
        self._metrics.generated_tokens.observe(event.tokens)
        self.reason = self.reason or event.reason
        self.slot_seconds.append(event.seconds - event.queue_seconds)
        self._empty_timeouts += event.reason == "deadline" and event.tokens == 0
        # If only some choices got no token in time, they are returned empty.
        none_in_time = self._empty_timeouts == len(self.choices)
        error = _timeout_error() if none_in_time else _generation_error(event)
        if error is not None:
            self.close(event.reason)
            raise error


def _generation_error(event: Finished) -> APIError | None:
    """The error for a choice that was interrupted; None for a complete one."""
    if event.reason == "error":
        # The log has the full message.
        message = event.message.partition("\n")[0][:_MAX_MESSAGE] or "generation failed"
        return APIError(500, message, code="engine_error")
    if event.reason == "cancelled":
        return _stopped_error()
    return None


def _timeout_error() -> APIError:
    message = "timeout: no token was generated in time; the server is busy"
    return APIError(504, message, param="timeout", code="deadline")


def _stopped_error() -> APIError:
    return APIError(503, "the server is shutting down", code="stopped", retry_after=5)


async def wait_for_disconnect(receive: Any) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
