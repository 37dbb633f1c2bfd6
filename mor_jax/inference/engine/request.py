"""Requests to the engine, and the events that it returns."""

import dataclasses
import math
from typing import Literal

import numpy as np

from mor_jax.config.parsing import check, check_not_negative, check_positive

MAX_LOGPROBS = 20
"""Most alternatives that a request may ask for at each token."""

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled from the logits.

    temperature: 0 is greedy. top_k: the best k tokens only; None: all. top_p: the fewest tokens
    whose probabilities sum to it. min_p: tokens at least this fraction as likely as the best one.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or
    the output. presence_penalty, frequency_penalty: subtracted from the logits of tokens in the
    output, once and once for each occurrence. seed: None draws one.
    Order: penalties, temperature, top_k, top_p, min_p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def validate(self, path: str = "sampling") -> None:
        """Raises `ValueError` on a setting out of range."""
        numbers = ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in numbers:
            value = getattr(self, name)
            check(math.isfinite(value), f"{path}.{name}", value, "must be finite", "Leave it out")
        check_not_negative(path, self, "temperature")
        check_positive(path, self, "repetition_penalty")
        ok = self.top_k is None or self.top_k > 0
        check(ok, f"{path}.top_k", self.top_k, "must be positive", "Omit it for no limit")
        rule = "must be in (0, 1]; it is a probability"
        check(0 < self.top_p <= 1, f"{path}.top_p", self.top_p, rule, "Try 0.95")
        rule = "must be in [0, 1]; it is a fraction of the best token's probability"
        check(0 <= self.min_p <= 1, f"{path}.min_p", self.min_p, rule, "Try 0.05")
        rule = "must be in -2 .. 2"
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(-2 <= value <= 2, f"{path}.{name}", value, rule, "Try 0.5")
        ok = self.seed is None or 0 <= self.seed < 2**32
        check(ok, f"{path}.seed", self.seed, "must be in 0 .. 2**32 - 1", "Try 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    prompt: token ids, at least one. max_tokens: of the output. stop: stop strings; they end the
    output and do not appear in it. stop_tokens: token ids that do the same, besides EOS.
    ignore_eos: continue after EOS. logprobs: number of alternatives returned with their
    log-probabilities at each token; 0: the sampled token's only; None: none.
    deadline: seconds after submission at which generation stops.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 256
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    deadline: float | None = None

    def validate(self, vocab_size: int, max_length: int, path: str = "request") -> None:
        """Raises `ValueError` unless it fits the vocabulary and `max_length` tokens."""
        rule = "needs at least one token"
        check(len(self.prompt) > 0, f"{path}.prompt", self.prompt, rule, "Begin with the EOS token")
        check_positive(path, self, "max_tokens")
        self.sampling.validate(path)
        for name, tokens in (("prompt", self.prompt), ("stop_tokens", self.stop_tokens)):
            for i, token in enumerate(tokens):
                rule = f"must be a whole number in 0 .. {vocab_size - 1}, the model's vocabulary"
                fix = "Use the tokenizer of this model"
                ok = isinstance(token, int | np.integer) and 0 <= token < vocab_size
                check(ok, f"{path}.{name}[{i}]", token, rule, fix)
        total = len(self.prompt) + self.max_tokens
        rule = (
            f"prompt ({len(self.prompt)} tokens) and output may have at most {max_length} together"
        )
        fix = f"Shorten the prompt or use at most {max(max_length - len(self.prompt), 0)}"
        check(total <= max_length, f"{path}.max_tokens", self.max_tokens, rule, fix)
        for i, text in enumerate(self.stop):
            check(text != "", f"{path}.stop[{i}]", text, "must not be empty", "Leave it out")
        if self.logprobs is not None:
            rule = f"must be in 0 .. {MAX_LOGPROBS}"
            ok = 0 <= self.logprobs <= MAX_LOGPROBS
            check(ok, f"{path}.logprobs", self.logprobs, rule, "Try 5")
        if self.deadline is not None:
            check_positive(path, self, "deadline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """One output token, in order.

    text: what it adds; empty while a character or a possible stop string is incomplete (that text
    comes with a later token or with `Finished`). offset: characters of the output before this
    token's text, emitted or not; a token that continues a character has the offset of the token
    that started it. logprob: natural logarithm under the model's own distribution, before
    penalties, temperature and truncation. top: the most likely tokens as (id, logprob), best first.
    depth: recursions of the token that predicted this one; 0 for a model without routers.
    """

    index: int
    id: int
    text: str
    offset: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    depth: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of the output: always the last event, exactly once.

    text: text that was held back. tokens: number of output tokens. message: what went wrong, for
    reason `error`. first_token_seconds, seconds, queue_seconds: from submission to the first token,
    to the end, and to the first slot.
    """

    reason: Reason
    text: str = ""
    prompt_tokens: int
    tokens: int
    message: str = ""
    first_token_seconds: float | None = None
    seconds: float = 0.0
    queue_seconds: float = 0.0


Event = Token | Finished


class Busy(Exception):
    """The engine's queue is full: try again later."""


class Stopped(Exception):
    """The engine takes no more requests: it is shutting down, or it has failed."""
