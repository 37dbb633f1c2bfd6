"""The inference engine: accepts requests and returns their events, from any thread.

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

_CHECK_SECONDS = 0.02
"""Seconds between two searches of the waiting queue for cancelled and late requests."""

_CONTEXT_TOKENS = 64
"""Prompt tokens that the first characters of the output may depend on."""


class Handle:
    """A submitted request. Iterating over it waits for its events; `Finished` is the last."""

    def __init__(self, wake: Callable[[], None]):
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake = wake
        self._result: tuple[list[Token], Finished] | None = None
        self._ended = False
        self.sequence: Sequence | None = None

    def put(self, event: Event) -> None:
        """Adds an event; called by the engine."""
        self._events.put(event)

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            event = self._events.get()
            self._ended = isinstance(event, Finished)
            yield event

    def result(self) -> tuple[list[Token], Finished]:
        """Waits for the end; returns the tokens that were not iterated over, and `Finished`.

        Raises `ValueError` if `Finished` was iterated over before.
        """
        if self._result is None:
            events = list(self)
            rule = "its events were iterated over to the end; none are left"
            check(bool(events), "handle", self._ended, rule, "Use either the iterator or result()")
            *tokens, finished = events
            self._result = tokens, finished
        return self._result

    def cancel(self) -> None:
        """Ends the request soon, with reason `cancelled`; no effect if it has finished."""
        if self.sequence is not None:
            self.sequence.cancelled = True
        self._wake()


class Engine:
    """Continuous batching of requests to one model, as many at a time as slots and cache allow.

    A request's tokens depend on its prompt, sampling params and seed only. Raises `ValueError` if
    the settings do not fit the model or the memory.
    """

    def __init__(self, model: LoadedModel, cfg: EngineConfig | None = None):
        self.model, self.cfg = model, cfg or EngineConfig()
        self.plan = plan_cache(model, self.cfg)
        self.max_length = self.plan.max_length
        self.failure: str | None = None
        self._runner = ModelRunner(model, self.plan, self.cfg.piece)
        self._incoming: collections.deque[Sequence] = collections.deque()
        self._condition = threading.Condition()
        self._accepting = self._stopping = self._cancelling = False
        self._last_check = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop(drain=kind is None)

    def start(self) -> None:
        """Starts the engine's thread; with `warm` it compiles everything first."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before; create a new one")
        if self.cfg.warm:
            self._runner.warmup()
        self._accepting = True
        self._thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Accepts no more requests and stops: after all have finished, or (`drain=False`) at once.

        timeout: seconds after which unfinished requests are cancelled.
        """
        with self._condition:
            self._accepting, self._stopping = False, True
            self._cancelling = self._cancelling or not drain
            self._condition.notify_all()
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._condition:
                self._cancelling = True
                self._condition.notify_all()
            self._thread.join()

    def submit(self, request: Request, sink: Sink | None = None) -> Handle:
        """Queues a request.

        sink: called with every event, on the engine's thread, instead of iterating over the handle;
        it must not block.

        Raises:
            ValueError: a setting is out of range, or the request exceeds `max_length` tokens.
            Busy: the waiting queue is full.
            Stopped: the engine accepts no requests.
        """
        request.validate(self.plan.spec.cfg.vocab_size, self.max_length)
        handle = Handle(self._wake)
        seed = request.sampling.seed
        text = TextStream(self.model.tokenizer, request.stop, request.prompt[-_CONTEXT_TOKENS:])
        sequence = Sequence(
            request, sink or handle.put, secrets.randbits(32) if seed is None else seed, text
        )
        handle.sequence = sequence
        with self._condition:
            if not self._accepting:
                raise Stopped(self.failure or "the engine is stopped and accepts no requests")
            if len(self._incoming) + len(self._runner.scheduler.waiting) >= self.cfg.max_waiting:
                raise Busy(f"{self.cfg.max_waiting} requests are waiting; try again later")
            self._incoming.append(sequence)
            self._condition.notify_all()
        return handle

    def statistics(self) -> Statistics:
        """Current counters and gauges."""
        return self._runner.statistics()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _run_loop(self) -> None:
        try:
            while self._process_incoming():
                if not self._runner.step():
                    self._wait_for_work()
        # Every error must reach the clients that wait for a result.
        except BaseException as error:
            _log.exception("the engine failed")
            with self._condition:
                self.failure = f"{type(error).__name__}: {error}"
                self._accepting = False
            self._fail_unfinished()

    def _process_incoming(self) -> bool:
        """Handles new requests, cancellations and deadlines; False once the engine may stop."""
        with self._condition:
            arrived = list(self._incoming)
            self._incoming.clear()
            stopping, cancelling = self._stopping, self._cancelling
        scheduler = self._runner.scheduler
        scheduler.waiting.extend(arrived)
        now = time.monotonic()
        checked = list(scheduler.running.values())
        if now - self._last_check > _CHECK_SECONDS or cancelling:
            checked, self._last_check = scheduler.unfinished(), now
        for sequence in checked:
            if sequence.cancelled or cancelling:
                self._runner.end(sequence, "cancelled")
            elif sequence.past_deadline:
                self._runner.end(sequence, "deadline")
        return bool(scheduler.running or scheduler.waiting) or not stopping

    def _wait_for_work(self) -> None:
        """Waits for a request or for `stop`."""
        with self._condition:
            if not self._incoming and not self._stopping:
                self._condition.wait(timeout=1.0)

    def _fail_unfinished(self) -> None:
        with self._condition:
            unfinished = [*self._runner.scheduler.unfinished(), *self._incoming]
            self._incoming.clear()
        for sequence in unfinished:
            if not sequence.finished:
                sequence.finish("error", f"the engine failed: {self.failure}")


__all__ = ["Engine", "EngineConfig", "Handle"]
