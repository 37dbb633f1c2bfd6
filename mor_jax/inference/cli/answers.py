"""Completions of a list of prompts: their events in order, and totals.

The engine generates many completions at once. Here they come out one after the other, each as early
as that order allows.
"""

import dataclasses
import functools
import itertools
import queue
import time
from collections.abc import Generator, Sequence
from typing import Any

from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.cli.prompts import Prompt
from mor_jax.inference.detokenizer import token_text
from mor_jax.inference.engine.engine import Engine, Handle
from mor_jax.inference.engine.request import Event, Finished, Request, Token

Arrival = tuple[int, Event, float]
"""Index of a completion, its event, and the time of arrival."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Completion:
    """One completion so far.

    index: among those of its prompt, from 0. first, last: arrival of the first token and of the
    last event, in seconds of `time.perf_counter`.
    """

    prompt: Prompt
    index: int
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finished: Finished | None = None
    first: float | None = None
    last: float = 0.0

    @property
    def request(self) -> Request:
        """Its request to the engine."""
        return self.prompt.requests[self.index]

    @property
    def text(self) -> str:
        """Its text so far."""
        end = self.finished.text if self.finished else ""
        return "".join(token.text for token in self.tokens) + end

    def add_event(self, event: Event, now: float) -> None:
        """Adds the next event, which arrived at `now`."""
        self.last = now
        if isinstance(event, Token):
            self.first = now if self.first is None else self.first
            self.tokens.append(event)
        else:
            self.finished = event

    def to_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """JSON values of a finished completion. depths: recursions of the position that predicted
        each token, 0 without routers. seconds: from submission."""
        assert self.finished is not None
        record = {
            "id": self.prompt.id,
            "index": self.index,
            "prompt": self.prompt.text,
            "text": self.text,
            "reason": self.finished.reason,
            "prompt_tokens": self.finished.prompt_tokens,
            "tokens": [token.id for token in self.tokens],
            "depths": [token.depth for token in self.tokens],
            "seed": self.request.sampling.seed,
            "first_token_seconds": self.finished.first_token_seconds,
            "seconds": self.finished.seconds,
        }
        if self.finished.message:
            record["message"] = self.finished.message
        if self.request.logprobs is not None:
            record["logprobs"] = [token.logprob for token in self.tokens]
        if self.request.logprobs:
            record["top"] = [
                [{"id": i, "text": token_text(tokenizer, i), "logprob": p} for i, p in token.top]
                for token in self.tokens
            ]
        return record


def stream(
    engine: Engine, prompts: Sequence[Prompt], ahead: int
) -> Generator[tuple[Completion, Event], None, None]:
    """All events of all completions, each with its completion, one completion after the other.

    ahead: completions submitted to the engine at a time. They are cancelled when the caller closes
    the generator.
    """
    jobs = [(prompt, index) for prompt in prompts for index in range(len(prompt.requests))]
    arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
    waiting: dict[int, list[tuple[Event, float]]] = {}
    running: dict[int, Handle] = {}
    numbers = iter(range(len(jobs)))
    try:
        for number, (prompt, index) in enumerate(jobs):
            answer = Completion(prompt=prompt, index=index)
            while answer.finished is None:
                for next_number in itertools.islice(numbers, ahead - len(running)):
                    waiting[next_number] = []
                    request = jobs[next_number][0].requests[jobs[next_number][1]]
                    running[next_number] = engine.submit(
                        request, functools.partial(_put, arrivals, next_number)
                    )
                while not waiting[number]:
                    source, event, now = arrivals.get()
                    waiting[source].append((event, now))
                    if isinstance(event, Finished):
                        del running[source]
                        break
                events, waiting[number] = waiting[number], []
                for event, now in events:
                    answer.add_event(event, now)
                    yield answer, event
            del waiting[number]
    finally:
        for handle in running.values():
            handle.cancel()


def _put(arrivals: queue.SimpleQueue[Arrival], number: int, event: Event) -> None:
    arrivals.put((number, event, time.perf_counter()))


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Sums over completions, updated with every event. first, last: as in `Completion`."""

    answers: int = 0
    tokens: int = 0
    depth: int = 0
    first: float | None = None
    last: float = 0.0
    errors: list[str] = dataclasses.field(default_factory=list)
    first_token_seconds: list[float] = dataclasses.field(default_factory=list)

    def add(self, answer: Completion, event: Event) -> None:
        """Counts the newest event of a completion."""
        self.last = max(self.last, answer.last)
        if isinstance(event, Token):
            assert answer.first is not None
            self.first = answer.first if self.first is None else min(self.first, answer.first)
            self.tokens += 1
            self.depth += event.depth
            return
        self.answers += 1
        if event.reason == "error":
            self.errors.append(event.message)
        if event.first_token_seconds is not None:
            self.first_token_seconds.append(event.first_token_seconds)

    def line(self, recursions: int | None) -> str:
        """A summary line. recursions: of the model; None without routers."""
        parts = [_number(self.tokens, "token")]
        if self.answers > 1:
            parts[0] += f" in {self.answers} answers"
        if self.first_token_seconds:
            median = sorted(self.first_token_seconds)[len(self.first_token_seconds) // 2]
            parts.append(f"first token after {median:.2f} s")
            parts[-1] += " (median)" if len(self.first_token_seconds) > 1 else ""
        if self.first is not None and self.tokens > 1:
            # Excludes the time before the first token, which includes compilation.
            rate = (self.tokens - 1) / max(self.last - self.first, 1e-9)
            parts.append(f"from then on {rate:.1f} tokens/s")
        if recursions is not None and self.tokens:
            parts.append(f"mean depth {self.depth / self.tokens:.2f} of {recursions}")
        return ", ".join(parts)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
