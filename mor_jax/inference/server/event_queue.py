"""Events of answers on their way from the engine's thread to the server's event loop.

The engine hands an event over in about a microsecond, whatever becomes of it: it never waits for a
client. What a client leaves unread is bounded for each answer.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Sequence

from mor_jax.inference.engine.request import Event, Finished

Timed = tuple[Event, float]
"""An event, and the time of `time.perf_counter` at which the engine gave it."""


class EventQueue:
    """The events of one answer that were not fetched yet. Lives in the event loop's thread.

    most: events that may wait. woken: set when one came. full: called once if more come; nothing is
    kept any more then.
    """

    def __init__(self, most: int, woken: asyncio.Event, full: Callable[[], None]) -> None:
        self._most, self._woken, self._full = most, woken, full
        self._closed = False
        self._events: list[Timed] = []

    def put(self, timed: Timed) -> None:
        """Takes an event in, unless nobody reads any more."""
        if self._closed:
            return
        # The end is always kept: there is one.
        if len(self._events) >= self._most and not isinstance(timed[0], Finished):
            self.close()
            self._full()
        else:
            self._events.append(timed)
        self._woken.set()

    def fetch(self) -> Sequence[Timed]:
        """What came since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Drops what is there and what may still come."""
        self._closed = True
        self._events.clear()


class EventQueues:
    """Carries events of all answers; wakes the event loop once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: collections.deque[tuple[EventQueue, Timed]] = collections.deque()
        self._flagged = False

    def sink(self, box: EventQueue) -> Callable[[Event], None]:
        """What the engine calls, from its own thread, with the events for `box`."""

        def post(event: Event) -> None:
            self._posted.append((box, (event, time.perf_counter())))
            # Racing threads may both wake the loop, which does no harm; none can miss to.
            if not self._flagged:
                self._flagged = True
                self._loop.call_soon_threadsafe(self._deliver)

        return post

    def _deliver(self) -> None:
        # Lowered first: whatever is posted from here on wakes the loop again.
        self._flagged = False
        while self._posted:
            box, timed = self._posted.popleft()
            box.put(timed)
