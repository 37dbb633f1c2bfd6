"""Answers to a list of prompts: their events in order, and totals.

The engine works on many answers at once. Here they come out one after the other, each as early as
that order allows.
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

Arrived = tuple[int, Event, float]
"""Number of an answer, what came, and when."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Completion:
    """One answer as it grows.

    index: among those to its prompt, from 0. first, last: when its first token and its last event
    came, in seconds of the clock that `stream` reads.
    """

    prompt: Prompt
    index: int
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finished: Finished | None = None
    first: float | None = None
    last: float = 0.0

    @property
    def request(self) -> Request:
        """What the engine was asked."""
        return self.prompt.requests[self.index]

    @property
    def text(self) -> str:
        """All of it so far."""
        end = self.finished.text if self.finished else ""
        return "".join(token.text for token in self.tokens) + end

    def take(self, event: Event, now: float) -> None:
        """Adds the next event, which came `now`."""
        self.last = now
        if isinstance(event, Token):
            self.first = now if self.first is None else self.first
            self.tokens.append(event)
        else:
            self.finished = event

    def to_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """JSON values of a finished answer. depths: recursions that it took to predict each token,
        0 without routers. seconds: from submission on."""
        assert self.finished is not None
        told = {
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
            told["message"] = self.finished.message
        if self.request.logprobs is not None:
            told["logprobs"] = [token.logprob for token in self.tokens]
        if self.request.logprobs:
            told["top"] = [
                [{"id": i, "text": token_text(tokenizer, i), "logprob": p} for i, p in token.top]
                for token in self.tokens
            ]
        return told


def stream(
    engine: Engine, prompts: Sequence[Prompt], ahead: int
) -> Generator[tuple[Completion, Event], None, None]:
    """All events of all answers, those of the first answer first, each with its answer.

    ahead: answers that the engine has at one time. Those that it has are cancelled when the caller
    closes this.
    """
    jobs = [(prompt, index) for prompt in prompts for index in range(len(prompt.requests))]
    arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
    waiting: dict[int, list[tuple[Event, float]]] = {}
    at_work: dict[int, Handle] = {}
    numbers = iter(range(len(jobs)))
    try:
        for number, (prompt, index) in enumerate(jobs):
            answer = Completion(prompt=prompt, index=index)
            while answer.finished is None:
                for free in itertools.islice(numbers, ahead - len(at_work)):
                    waiting[free] = []
                    request = jobs[free][0].requests[jobs[free][1]]
                    at_work[free] = engine.submit(request, functools.partial(_put, arrived, free))
                while not waiting[number]:
                    where, event, now = arrived.get()
                    waiting[where].append((event, now))
                    if isinstance(event, Finished):
                        del at_work[where]
                        break
                events, waiting[number] = waiting[number], []
                for event, now in events:
                    answer.take(event, now)
                    yield answer, event
            del waiting[number]
    finally:
        for handle in at_work.values():
            handle.cancel()


def _put(arrived: queue.SimpleQueue[Arrived], number: int, event: Event) -> None:
    arrived.put((number, event, time.perf_counter()))


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Sums over answers, counted while their events come out. first, last: as in `Answer`."""

    answers: int = 0
    tokens: int = 0
    depth: int = 0
    first: float | None = None
    last: float = 0.0
    errors: list[str] = dataclasses.field(default_factory=list)
    waits: list[float] = dataclasses.field(default_factory=list)

    def add(self, answer: Completion, event: Event) -> None:
        """Counts the last event of an answer."""
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
            self.waits.append(event.first_token_seconds)

    def line(self, recursions: int | None) -> str:
        """For people. recursions: of the model, None where nothing is routed."""
        parts = [_number(self.tokens, "token")]
        if self.answers > 1:
            parts[0] += f" in {self.answers} answers"
        if self.waits:
            median = sorted(self.waits)[len(self.waits) // 2]
            parts.append(f"first token after {median:.2f} s")
            parts[-1] += " (median)" if len(self.waits) > 1 else ""
        if self.first is not None and self.tokens > 1:
            # Without what comes before any token: programs are compiled then.
            rate = (self.tokens - 1) / max(self.last - self.first, 1e-9)
            parts.append(f"from then on {rate:.1f} tokens/s")
        if recursions is not None and self.tokens:
            parts.append(f"mean depth {self.depth / self.tokens:.2f} of {recursions}")
        return ", ".join(parts)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
