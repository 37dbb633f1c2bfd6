"""Streaming detokenisation: complete characters only, and no part of a stop string.

Each step decodes a window of a few tokens, so the cost of a token does not depend on the length of
the output. The window starts with a token that prints something, because tokenizers that mark words
by a leading space drop the space of the first word.
"""

import codecs
import functools
from collections.abc import Callable, Sequence

from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.token_bytes import token_bytes

# Length at which the window is shortened, and tokens that remain.
_MAX_WINDOW, _MIN_WINDOW = 16, 4

# Most bytes of a character that may be missing at the end of a text.
_MAX_MISSING_BYTES = 3

_REPLACEMENT = "\ufffd"


class TextStream:
    """Text of one output, token by token.

    The texts together are the decoded output, up to the first stop string. One exception:
    tokenizers with byte fallback may declare a whole run of bytes invalid because of its last byte;
    text emitted before that stays.

    offset: characters before the text of the last token, emitted or not; a token that continues a
    character has the offset of the token that started it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """stop: stop strings, not empty. prompt: tokens before the output; they decide whether its
        first word keeps its leading space."""
        self.offset = 0
        self._decode, self._bytes = tokenizer.decode, token_bytes(tokenizer)
        self._word = _word(tokenizer)
        self._stops = _StopStrings(stop)
        # Tokens that are decoded, the part of their text that was emitted, and tokens after it.
        self._window, self._emitted, self._broken = self._initial_window(prompt)
        self._limit = len(self._window) + _MAX_WINDOW
        # Characters that are final (emitted, or part of a possible stop string), and the text after
        # these, which the next token may still change.
        self._final_length, self._tentative = 0, self._decode(self._window)[len(self._emitted) :]

    def push(self, token: int) -> tuple[str, bool]:
        """Adds a token. Returns the new final text, and whether a stop string ended the output.
        Tokens after a stop string are ignored."""
        if self._stops.matched_stop:
            return "", True
        self._window.append(int(token))
        text = self._text()
        self.offset = self._last_offset()
        held = _trailing(text)
        self._broken = self._broken + 1 if held else 0
        # A character has at most four bytes: if it is incomplete after four tokens, it is invalid.
        if self._broken > _MAX_MISSING_BYTES:
            held = min(held, _MAX_MISSING_BYTES)
        new = self._emit_until(text, len(text) - held)
        self._tentative = text[len(self._emitted) :]
        if len(self._window) >= self._limit:
            self._shorten_window(text)
        return self._stops.feed(new), self._stops.matched_stop

    def finish(self) -> str:
        """The text held back at the end of the output; empty after a stop string."""
        text = self._text()
        return self._stops.feed(self._emit_until(text, len(text))) + self._stops.rest()

    def _initial_window(self, prompt: Sequence[int]) -> tuple[list[int], str, int]:
        """The window before the first token: the last tokens of the prompt, as many as are needed
        to print complete characters, and the result of `_complete_text` for it."""
        window, text, missing = list[int](), "", 0
        # One of the first four lengths starts between characters; the last spans blanks.
        for number in (
            *(2 * _MIN_WINDOW - i for i in range(_MAX_MISSING_BYTES + 1)),
            4 * _MAX_WINDOW,
        ):
            window = [int(token) for token in prompt[-number:]]
            text, missing = _complete_text(self._decode, window)
            if text.strip() and _REPLACEMENT not in text:
                break
        return window, text, missing

    def _text(self) -> str:
        """The window's text, which starts with the emitted text."""
        text = self._decode(self._window)
        if text.startswith(self._emitted):
            return text
        # The last tokens have changed the text of earlier ones: restart the window with them.
        last_tokens = 1 + min(self._broken, _MAX_MISSING_BYTES)
        self._window = [*self._word, *self._window[-last_tokens:]]
        self._emitted = self._decode(self._word)
        return self._decode(self._window)

    def _emit_until(self, text: str, final_length: int) -> str:
        new = text[len(self._emitted) : final_length]
        self._emitted += new
        self._final_length += len(new)
        return new

    def _last_offset(self) -> int:
        """Offset of the last token's text."""
        if not self._tentative:
            return self._final_length
        *before, last = (self._bytes(token) for token in self._window[-1 - self._broken :])
        continues = _continues_character(b"".join(before), last)
        return self._final_length if continues else self._final_length + len(self._tentative)

    def _shorten_window(self, text: str) -> None:
        """Drops tokens from the start of the window if that does not change later text."""
        waiting = len(text) - len(self._emitted)
        next_word = self._decode([*self._window, *self._word])[len(text) :]
        for keep in range(_MIN_WINDOW, len(self._window) // 2 + 1):
            tail = self._window[-keep:]
            # Start with a token that prints something; otherwise a leading space may be dropped.
            for first in (self._word, self._window[-keep - 1 : -keep]):
                before, full_text = self._decode(first), self._decode([*first, *tail])
                rest = full_text[len(before) :]
                same = full_text.startswith(before) and text.endswith(rest) and len(rest) >= waiting
                if (
                    same
                    and self._decode([*first, *tail, *self._word])[len(full_text) :] == next_word
                ):
                    self._window, self._emitted = (
                        [*first, *tail],
                        full_text[: len(full_text) - waiting],
                    )
                    self._limit = len(self._window) + _MAX_WINDOW
                    return
        # Rare. Trying again only after it has doubled keeps the amortised cost per token constant.
        self._limit = 2 * len(self._window)


def text_before(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """The text of a prompt before the output; followed by `TextStream`'s text it is complete.

    An incomplete last character belongs to the output, which may complete it.
    """
    return _complete_text(tokenizer.decode, prompt)[0]


class _StopStrings:
    """Finds the first stop string in streamed text, with constant work per character.

    The stop string that is complete first ends the text; of several at the same place the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched_stop = False
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        # Length of each stop string's prefix that the text ends with.
        self._matched = [0] * len(self._stops)
        self._held_back = ""

    def feed(self, new: str) -> str:
        """Adds text; returns what can be emitted: all but a possible prefix of a stop string."""
        if self.matched_stop or not self._stops:
            return "" if self.matched_stop else new
        text = self._held_back + new
        for end, char in enumerate(new, len(self._held_back) + 1):
            complete = self._step(char)
            if complete:
                self.matched_stop = True
                self._held_back = ""
                return text[: end - complete]
        final_length = len(text) - max(self._matched)
        self._held_back = text[final_length:]
        return text[:final_length]

    def rest(self) -> str:
        """The text held back, at the end of the output."""
        held, self._held_back = self._held_back, ""
        return held

    def _step(self, char: str) -> int:
        """Length of the stop string that `char` completes, 0 for none (Knuth, Morris and Pratt)."""
        complete = 0
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = self._borders[i][matched - 1]
            matched += stop[matched] == char
            self._matched[i] = matched
            if matched == len(stop):
                complete = max(complete, matched)
        return complete


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`: length of its longest proper prefix that is also its suffix."""
    found, matched = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = found[matched - 1]
        matched += stop[i] == stop[matched]
        found[i] = matched
    return found


def _complete_text(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int]
) -> tuple[str, int]:
    """The text without an incomplete last character, and the number of that character's tokens."""
    for missing in range(min(_MAX_MISSING_BYTES, len(tokens)) + 1):
        text = decode(tokens[: len(tokens) - missing])
        if not _trailing(text):
            return text, missing
    return decode(tokens), 0


def _trailing(text: str) -> int:
    return len(text) - len(text.rstrip(_REPLACEMENT))


def _continues_character(before: bytes, last: bytes) -> bool:
    """Whether the first byte of `last` continues a character that `before` started."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(before)
    open_bytes = decoder.getstate()[0]
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        decoder.decode(open_bytes + last[:1])
    except UnicodeDecodeError:
        return False
    return bool(open_bytes)


@functools.lru_cache(maxsize=16)
def _word(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens of a short word, for tokenizers that add a space before words.

    The word of fewest tokens: one spelled in bytes could merge with neighbouring bytes.
    """
    words = tokenizer.encode_batch(["a", "the", "e", "1", "o", "\u7684"])
    return tuple(int(token) for token in min(words, key=len))


@functools.lru_cache(maxsize=2**16)
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of one token inside a text, with its leading space."""
    before = _word(tokenizer)
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
