"""Formats the choices of a response for the completions and chat endpoints."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mor_jax.inference.engine.request import Finished, Token

# Replaces minus infinity, which JSON cannot express; OpenAI's servers do the same.
_MIN_LOGPROB = -9999.0

TokenBytes = Callable[[int], bytes]
"""Maps a token id to its UTF-8 bytes."""


@dataclasses.dataclass
class Choice:
    """One choice so far, or its new part since the last chunk of a stream.

    index: among the choices of the request. echo: the prompt, if the response repeats it.
    prompt_characters: length of `echo`.
    """

    index: int
    prompt_tokens: int
    echo: str = ""
    prompt_characters: int = 0
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        """Text of the tokens, including what was held back until the end."""
        end = self.finished.text if self.finished else ""
        return self.echo + "".join(token.text for token in self.tokens) + end

    def parts(self, max_tokens: int) -> Iterator["Choice"]:
        """Removes and yields all new content, at most `max_tokens` tokens at a time."""
        tokens, finished, echo = self.tokens, self.finished, self.echo
        self.echo, self.tokens, self.finished = "", [], None
        for start in range(0, len(tokens) or 1, max_tokens):
            part = dataclasses.replace(self, echo=echo, tokens=tokens[start : start + max_tokens])
            if start + max_tokens >= len(tokens):
                part.finished = finished
            yield part
            echo = ""

    def finish_fields(self) -> dict[str, Any]:
        """finish_reason as in OpenAI's API; stop_reason names what that API has no value for."""
        if self.finished is None:
            return {"finish_reason": None}
        if self.finished.reason == "deadline":
            return {"finish_reason": "length", "stop_reason": "deadline"}
        return {"finish_reason": self.finished.reason}


class ResponseFormatter:
    """Formats choices for one endpoint.

    logprobs: alternatives, None for none. depths: whether to include each token's depth.
    Per-token fields are iterators instead of lists, so that they are built while they are sent.
    """

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, token_bytes: TokenBytes, logprobs: int | None, depths: bool) -> None:
        self.token_bytes, self.logprobs, self.depths = token_bytes, logprobs, depths

    @property
    def per_token(self) -> bool:
        """Whether tokens without text are sent too."""
        return self.logprobs is not None or self.depths

    def full(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """A part of a choice, for a streamed chunk."""
        raise NotImplementedError

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """The chunk that a stream sends for a choice before its first token."""
        return None

    def _extra_fields(self, choice: Choice) -> dict[str, Any]:
        depths = {"depths": (token.depth for token in choice.tokens)} if self.depths else {}
        return choice.finish_fields() | depths


class CompletionFormatter(ResponseFormatter):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def full(self, choice: Choice) -> dict[str, Any]:
        """The same as a chunk with all tokens."""
        return self.chunk(choice)

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """index, text, logprobs, finish_reason."""
        logprobs = None if self.logprobs is None else self._logprobs(choice)
        fields = {"index": choice.index, "text": choice.text, "logprobs": logprobs}
        return fields | self._extra_fields(choice)

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        tokens = choice.tokens
        return {
            "tokens": (self._token_name(token.id) for token in tokens),
            "token_logprobs": (_finite(token.logprob) for token in tokens),
            "top_logprobs": (
                {self._token_name(number): _finite(value) for number, value in token.top}
                for token in tokens
            ),
            "text_offset": (choice.prompt_characters + token.offset for token in tokens),
        }

    def _token_name(self, token: int) -> str:
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

    def full(self, choice: Choice) -> dict[str, Any]:
        """index, message, logprobs, finish_reason."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        fields = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice)}
        return fields | self._extra_fields(choice)

    def chunk(self, choice: Choice) -> dict[str, Any]:
        """index, delta, logprobs, finish_reason."""
        delta = {"content": choice.text} if choice.text else {}
        fields = {"index": choice.index, "delta": delta, "logprobs": self._logprobs(choice)}
        return fields | self._extra_fields(choice)

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The role of the message."""
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
    """Token counts of a request. prompts: tokens of each prompt, counted once for all choices."""
    prompt_tokens = sum(prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def _finite(logprob: float | None) -> float:
    return _MIN_LOGPROB if logprob is None or not logprob > _MIN_LOGPROB else logprob
