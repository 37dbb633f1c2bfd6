"""The engine: requests in, events out, from any thread.

with Engine(load_model("runs/mor"), EngineConfig(slots=32)) as engine:
    handle = engine.submit(Request(prompt=(1, 2, 3), max_tokens=64))
    for event in handle:
        ...
"""

import collections
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator

from mor_jax.config.parsing import check
from mor_jax.inference.config import EngineConfig, plan_cache
from mor_jax.inference.detokenizer import TextStream
from mor_jax.inference.engine.model_runner import ModelRunner
from mor_jax.inference.engine.request import Busy, Event, Finished, Request, Stopped, Token
from mor_jax.inference.engine.sequence import Sequence, Sink
from mor_jax.inference.engine.statistics import Statistics
from mor_jax.inference.load_model import LoadedModel

_log = logging.getLogger(__name__)

_LOOK = 0.02
"""Seconds after which the queue is searched again for requests that are cancelled or too late."""

_CONTEXT = 64
"""Tokens of the prompt that the first words of an answer's text may depend on."""


class Handle:
    """An answer on its way. Iterating over it waits for its events; `Finished` is the last."""

    def __init__(self, wake: Callable[[], None]):
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake = wake
        self._result: tuple[list[Token], Finished] | None = None
        self._ended = False
        self.sequence: Sequence | None = None

    def put(self, event: Event) -> None:
        """Takes an event; the engine's side."""
        self._events.put(event)

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            event = self._events.get()
            self._ended = isinstance(event, Finished)
            yield event

    def result(self) -> tuple[list[Token], Finished]:
        """Waits for the end: all tokens that were not iterated over before, and how it ended.

        Raises `ValueError` if the end itself was iterated over before.
        """
        if self._result is None:
            events = list(self)
            rule = "its events were iterated over to the end, there are none left"
            check(bool(events), "handle", self._ended, rule, "Use either the iterator or result()")
            *tokens, finished = events
            self._result = tokens, finished
        return self._result

    def cancel(self) -> None:
        """Ends the answer soon, with reason `cancelled`; nothing happens if it has ended."""
        if self.sequence is not None:
            self.sequence.cancelled = True
        self._wake()


class Engine:
    """Answers requests with one model, as many at a time as its slots and its cache hold.

    A request's tokens depend on its prompt, settings and seed alone. Raises `ValueError` if the
    settings do not fit the model or the memory.
    """

    def __init__(self, served: LoadedModel, cfg: EngineConfig | None = None):
        self.served, self.cfg = served, cfg or EngineConfig()
        self.plan = plan_cache(served, self.cfg)
        self.max_length = self.plan.max_length
        self.failure: str | None = None
        self._runner = ModelRunner(served, self.plan, self.cfg.piece)
        self._incoming: collections.deque[Sequence] = collections.deque()
        self._changed = threading.Condition()
        self._accepts = self._stops = self._cancels = False
        self._looked = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop(drain=kind is None)

    def start(self) -> None:
        """Starts the engine's thread; with `warm` it compiles everything first."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before; make another one")
        if self.cfg.warm:
            self._runner.warm()
        self._accepts = True
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests and ends: after all answers, or (not `drain`) by cancelling them.

        timeout: seconds after which what still runs is cancelled.
        """
        with self._changed:
            self._accepts, self._stops = False, True
            self._cancels = self._cancels or not drain
            self._changed.notify_all()
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                self._cancels = True
                self._changed.notify_all()
            self._thread.join()

    def submit(self, request: Request, sink: Sink | None = None) -> Handle:
        """Queues a request.

        sink: called with every event, from the engine's thread, in place of iterating over the
        handle; it must not block.

        Raises:
            ValueError: the model cannot answer the request, or `max_length` tokens do not hold it.
            Busy: the queue is full.
            Stopped: the engine takes no requests.
        """
        request.validate(self.plan.geometry.cfg.vocab_size, self.max_length)
        handle = Handle(self._wake)
        seed = request.sampling.seed
        text = TextStream(self.served.tokenizer, request.stop, request.prompt[-_CONTEXT:])
        sequence = Sequence(
            request, sink or handle.put, secrets.randbits(32) if seed is None else seed, text
        )
        handle.sequence = sequence
        with self._changed:
            if not self._accepts:
                raise Stopped(self.failure or "the engine does not take requests")
            if len(self._incoming) + len(self._runner.scheduler.waiting) >= self.cfg.max_waiting:
                raise Busy(f"{self.cfg.max_waiting} requests are waiting; try again later")
            self._incoming.append(sequence)
            self._changed.notify_all()
        return handle

    def statistics(self) -> Statistics:
        """Counters and gauges now."""
        return self._runner.statistics()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while self._take_in():
                if not self._runner.step():
                    self._rest()
        # Whatever it is, those who wait for an answer have to hear of it.
        except BaseException as error:
            _log.exception("the engine failed")
            with self._changed:
                self.failure = f"{type(error).__name__}: {error}"
                self._accepts = False
            self._give_up()

    def _take_in(self) -> bool:
        """New requests, cancellations and deadlines; False when there is nothing left to do."""
        with self._changed:
            arrived = list(self._incoming)
            self._incoming.clear()
            stops, cancels = self._stops, self._cancels
        scheduler = self._runner.scheduler
        scheduler.waiting.extend(arrived)
        now = time.monotonic()
        looked_at = list(scheduler.running.values())
        if now - self._looked > _LOOK or cancels:
            looked_at, self._looked = scheduler.everyone(), now
        for sequence in looked_at:
            if sequence.cancelled or cancels:
                self._runner.end(sequence, "cancelled")
            elif sequence.late:
                self._runner.end(sequence, "deadline")
        return bool(scheduler.running or scheduler.waiting) or not stops

    def _rest(self) -> None:
        """Waits for something to do."""
        with self._changed:
            if not self._incoming and not self._stops:
                self._changed.wait(timeout=1.0)

    def _give_up(self) -> None:
        with self._changed:
            left = [*self._runner.scheduler.everyone(), *self._incoming]
            self._incoming.clear()
        for sequence in left:
            if not sequence.done:
                sequence.ends("error", f"the engine failed: {self.failure}")


__all__ = ["Engine", "EngineConfig", "Handle"]
