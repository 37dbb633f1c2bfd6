"""A closed loop of clients: each has one request in the engine and asks again when it is answered.

What is measured lies in a window in which every client has work: it opens when half as many
requests are answered as there are clients, so that sequences stand at all stages, and closes when
the last request is handed in.
"""

import dataclasses
import queue
import statistics
import time
from collections.abc import Sequence

import numpy as np

from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Event, Finished, Request, SamplingParams, Token

MEAN, SPREAD, SHORTEST, LONGEST = 256, 64, 32, 480
"""Tokens of prompts and of answers: normally distributed, cut off at both ends."""

_EVERY = 50
"""Answer tokens between two looks at the cache."""


def requests(number: int, vocab_size: int, *, seed: int = 0) -> list[Request]:
    """Random prompts; answers of random lengths, drawn from the model's own distribution."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.normal(MEAN, SPREAD, (number, 2)), SHORTEST, LONGEST).astype(int)
    return [
        Request(
            prompt=tuple(rng.integers(0, vocab_size, prompt).tolist()),
            max_tokens=int(answer),
            sampling=SamplingParams(temperature=1.0, seed=i),
            ignore_eos=True,
        )
        for i, (prompt, answer) in enumerate(lengths)
    ]


def prompts(number: int, vocab_size: int) -> np.ndarray:
    """Random prompts of `MEAN` tokens, int [number, MEAN]."""
    return np.random.default_rng(1).integers(0, vocab_size, (number, MEAN))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What the clients saw in the window. Seconds; rates per second.

    cpu_seconds: of all threads of this process. first: from a request to its first token. between:
    from a token to the next. running: sequences between their first and their last token, on
    average. stored, given: bytes of keys and values for each of their tokens, and of the pages that
    hold them. useful: share of block rows with work. host: share of the time in which the engine
    did not wait for the device. idle: share in which the device had nothing to do, at most. depth:
    mean recursions of answer tokens.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    rate: float
    prompt_rate: float
    first_median: float
    first_p99: float
    between_median: float
    between_p99: float
    running: float
    stored: float
    given: float
    useful: float
    host: float
    idle: float
    depth: float


@dataclasses.dataclass
class _Client:
    """A request on its way: when it was handed in, and when its last token came."""

    request: Request
    start: float
    last: float | None = None
    tokens: int = 0


@dataclasses.dataclass
class _Window:
    """What is gathered while it is open."""

    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    running: list[int] = dataclasses.field(default_factory=list)
    stored: list[float] = dataclasses.field(default_factory=list)
    given: list[float] = dataclasses.field(default_factory=list)
    cpu: float = 0.0
    prompts: int = 0
    tokens: int = 0
    depths: int = 0


def drive(engine: Engine, work: Sequence[Request], clients: int) -> Seen:
    """Answers all of `work`, `clients` requests at a time.

    Raises:
        RuntimeError: a request ended otherwise than with all its tokens.
    """
    events: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()
    waiting = list(enumerate(work))[::-1]
    flying: dict[int, _Client] = {}

    def submit() -> None:
        number, request = waiting.pop()
        flying[number] = _Client(request, time.perf_counter())
        engine.submit(request, sink=lambda event: events.put((number, time.perf_counter(), event)))

    for _ in range(min(clients, len(waiting))):
        submit()
    window, opened, closed, finished = _Window(), None, None, 0
    before = after = engine.statistics()
    while flying:
        number, now, event = events.get()
        client = flying[number]
        is_open = opened is not None and closed is None
        if isinstance(event, Token):
            if is_open:
                _count(window, client, event, now)
            client.last, client.tokens = now, client.tokens + 1
            if is_open and window.tokens % _EVERY == 0:
                _sample(window, engine, flying)
            continue
        _check(client, event)
        del flying[number]
        finished += 1
        if waiting:
            submit()
        if opened is None and finished >= clients // 2:
            opened, before = now, engine.statistics()
            window.cpu = time.process_time()
        if opened is not None and closed is None and not waiting:
            closed, after = now, engine.statistics()
            window.cpu = time.process_time() - window.cpu
    if opened is None or closed is None or closed <= opened:
        raise ValueError(f"requests={len(work)}: too few for {clients} clients. Give twice as many")
    return _seen(window, closed - opened, (before, after))


def in_waves(engine: Engine, work: Sequence[Request], batch: int) -> float:
    """Static batching: `batch` requests start together, the next when all are answered.

    Returns answer tokens a second, all waves from start to end.
    """
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(work), batch):
        handles = [engine.submit(request) for request in work[first : first + batch]]
        for handle, request in zip(handles, work[first : first + batch], strict=True):
            answer, finished = handle.result()
            _check(_Client(request, start, tokens=len(answer)), finished)
            tokens += len(answer)
    return tokens / (time.perf_counter() - start)


def together(engine: Engine, rows: np.ndarray, new: int) -> tuple[np.ndarray, float]:
    """Greedy answers of `new` tokens to prompts of one length, and the seconds that all took."""
    start, greedy = time.perf_counter(), SamplingParams(temperature=0.0)
    handles = [
        engine.submit(Request(prompt=tuple(row), max_tokens=new, sampling=greedy, ignore_eos=True))
        for row in rows.tolist()
    ]
    answers = [handle.result()[0] for handle in handles]
    seconds = time.perf_counter() - start
    return np.array([[token.id for token in answer] for answer in answers]), seconds


def _count(window: _Window, client: _Client, token: Token, now: float) -> None:
    window.tokens += 1
    window.depths += token.depth
    if client.last is None:
        window.first.append(now - client.start)
        window.prompts += len(client.request.prompt)
    else:
        window.between.append(now - client.last)


def _check(client: _Client, event: Finished) -> None:
    wanted = client.request.max_tokens
    if event.reason != "length" or client.tokens != wanted:
        raise RuntimeError(f"{client.tokens} of {wanted} tokens, {event.reason}: {event.message}")


def _sample(window: _Window, engine: Engine, flying: dict[int, _Client]) -> None:
    """What is stored now, over the tokens that it is of."""
    running = [client for client in flying.values() if client.tokens]
    held = sum(len(client.request.prompt) + client.tokens for client in running)
    window.running.append(len(running))
    if held:
        statistics = engine.statistics()
        window.stored.append(statistics.stored_bytes / held)
        window.given.append(statistics.used_bytes / held)


def _seen(window: _Window, seconds: float, statistics_of: tuple) -> Seen:
    before, after = statistics_of
    rows = after.rows - before.rows
    busy = after.busy_seconds - before.busy_seconds
    host = after.host_seconds - before.host_seconds
    return Seen(
        seconds=seconds,
        cpu_seconds=window.cpu,
        tokens=window.tokens,
        rate=window.tokens / seconds,
        prompt_rate=window.prompts / seconds,
        first_median=statistics.median(window.first),
        first_p99=float(np.quantile(window.first, 0.99)),
        between_median=statistics.median(window.between),
        between_p99=float(np.quantile(window.between, 0.99)),
        running=statistics.fmean(window.running),
        stored=statistics.fmean(window.stored),
        given=statistics.fmean(window.given),
        useful=(after.useful_rows - before.useful_rows) / max(rows, 1),
        host=host / max(busy, 1e-9),
        idle=(after.idle_seconds - before.idle_seconds) / max(busy, 1e-9),
        depth=window.depths / max(window.tokens, 1),
    )
