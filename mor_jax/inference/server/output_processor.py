"""One answer of a request as it grows, and how the two endpoints write it down."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mor_jax.inference.engine.request import Finished, Token

# JSON has no minus infinity; OpenAI's servers write this instead.
_IMPOSSIBLE = -9999.0

TokenBytes = Callable[[int], bytes]
"""The bytes of UTF-8 that a token stands for."""


@dataclasses.dataclass
class Choice:
    """An answer so far, or the part of it that has come since the last chunk of a stream.

    index: among the answers of the request. echo: the prompt, where the answer repeats it; before:
    its characters.
    """

    index: int
    prompt_tokens: int
    echo: str = ""
    before: int = 0
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        """What the tokens add, with what was held back at the end."""
        end = self.finished.text if self.finished else ""
        return self.echo + "".join(token.text for token in self.tokens) + end

    def parts(self, most: int) -> Iterator["Choice"]:
        """Takes out what has come, at most so many tokens at a time, and leaves nothing."""
        tokens, finished, echo = self.tokens, self.finished, self.echo
        self.echo, self.tokens, self.finished = "", [], None
        for start in range(0, len(tokens) or 1, most):
            part = dataclasses.replace(self, echo=echo, tokens=tokens[start : start + most])
            if start + most >= len(tokens):
                part.finished = finished
            yield part
            echo = ""

    def ending(self) -> dict[str, Any]:
        """finish_reason as OpenAI has it; what it has no word for is in stop_reason."""
        if self.finished is None:
            return {"finish_reason": None}
        if self.finished.reason == "deadline":
            return {"finish_reason": "length", "stop_reason": "deadline"}
        return {"finish_reason": self.finished.reason}


class ResponseFormatter:
    """How an endpoint writes answers. logprobs: alternatives, None for none. depths: as asked.

    What grows with the answer is an iterator in place of a list: it is made while it is written.
    """

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, token_bytes: TokenBytes, logprobs: int | None, depths: bool) -> None:
        self.token_bytes, self.logprobs, self.depths = token_bytes, logprobs, depths

    @property
    def per_token(self) -> bool:
        """Whether tokens without text are written too."""
        return self.logprobs is not None or self.depths

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """A part of a choice, for a stream."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says about a choice before its first token."""
        return None

    def _more(self, choice: Choice) -> dict[str, Any]:
        depths = {"depths": (token.depth for token in choice.tokens)} if self.depths else {}
        return choice.ending() | depths


class CompletionFormatter(ResponseFormatter):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """As the chunk that holds everything."""
        return self.chunk(choice)

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """index, text, logprobs, finish_reason."""
        logprobs = None if self.logprobs is None else self._logprobs(choice)
        head = {"index": choice.index, "text": choice.text, "logprobs": logprobs}
        return head | self._more(choice)

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        tokens = choice.tokens
        return {
            "tokens": (self._name(token.id) for token in tokens),
            "token_logprobs": (_finite(token.logprob) for token in tokens),
            "top_logprobs": (
                {self._name(number): _finite(value) for number, value in token.top}
                for token in tokens
            ),
            "text_offset": (choice.before + token.offset for token in tokens),
        }

    def _name(self, token: int) -> str:
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # Part of a character, as OpenAI's servers write it.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatFormatter(ResponseFormatter):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """index, message, logprobs, finish_reason."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        head = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice)}
        return head | self._more(choice)

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """index, delta, logprobs, finish_reason."""
        delta = {"content": choice.text} if choice.text else {}
        head = {"index": choice.index, "delta": delta, "logprobs": self._logprobs(choice)}
        return head | self._more(choice)

    def opening(self, index: int) -> dict[str, Any]:
        """The role, which comes first."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = (
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(number, value) for number, value in token.top]}
            for token in choice.tokens
        )
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def usage(prompts: Sequence[int], tokens: int) -> dict[str, int]:
    """Counts of a request. prompts: tokens of each prompt, counted once however many answers."""
    read = sum(prompts)
    return {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}


def _finite(logprob: float | None) -> float:
    return _IMPOSSIBLE if logprob is None or not logprob > _IMPOSSIBLE else logprob
