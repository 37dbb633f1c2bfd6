"""Queues that carry events from the engine's thread to the server's event loop.

Posting an event takes about a microsecond and never waits for a client. Each queue has a bound on
unread events.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Sequence

from mor_jax.inference.engine.request import Event, Finished

TimedEvent = tuple[Event, float]
"""An event, and the time (`time.perf_counter`) at which the engine emitted it."""


class EventQueue:
    """Unread events of one choice. Used by the event loop's thread only.

    max_events: bound on unread events. wake: set when an event arrives. on_full: called once when
    the bound is exceeded; the queue is closed then.
    """

    def __init__(self, max_events: int, wake: asyncio.Event, on_full: Callable[[], None]) -> None:
        self._max_events, self._wake, self._on_full = max_events, wake, on_full
        self._closed = False
        self._events: list[TimedEvent] = []

    def put(self, timed_event: TimedEvent) -> None:
        """Adds an event, unless the queue is closed."""
        if self._closed:
            return
        # `Finished` is always kept: there is only one.
        if len(self._events) >= self._max_events and not isinstance(timed_event[0], Finished):
            self.close()
            self._on_full()
        else:
            self._events.append(timed_event)
        self._wake.set()

    def fetch(self) -> Sequence[TimedEvent]:
        """Removes and returns all unread events, oldest first."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Drops all unread and all later events."""
        self._closed = True
        self._events.clear()


class EventDispatcher:
    """Delivers events to all queues; wakes the event loop once for many events."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: collections.deque[tuple[EventQueue, TimedEvent]] = collections.deque()
        self._flagged = False

    def sink(self, event_queue: EventQueue) -> Callable[[Event], None]:
        """A sink for the engine's thread that posts events to `event_queue`."""

        def post(event: Event) -> None:
            self._posted.append((event_queue, (event, time.perf_counter())))
            # Racing threads may both wake the loop, which is harmless; no wake-up is lost.
            if not self._flagged:
                self._flagged = True
                self._loop.call_soon_threadsafe(self._deliver)

        return post

    def _deliver(self) -> None:
        # Cleared first: every event posted from here on wakes the loop again.
        self._flagged = False
        while self._posted:
            event_queue, timed_event = self._posted.popleft()
            event_queue.put(timed_event)
