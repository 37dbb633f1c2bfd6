"""Text of an answer while its tokens arrive: whole characters only, and nothing of a stop text.

Decoding goes through a window of a few tokens, so that a token costs the same however long the
answer is. The window begins with a token that is known to print something, because tokenizers that
mark words by a leading space drop that of a first word.
"""

import codecs
import functools
from collections.abc import Callable, Sequence

from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.token_bytes import token_bytes

# Tokens of the window at which it is cut, and those that stay.
_LONG, _SHORT = 16, 4

# Bytes of a character that may be missing at the end of a text.
_MISSING = 3

_UNKNOWN = "\ufffd"


class TextStream:
    """The text that one answer's tokens add, piece by piece.

    The pieces together are the decoded answer, up to the first stop text. One exception: tokenizers
    that fall back to bytes may declare a whole run of bytes invalid because of its last one; what
    was given out before that stays.

    offset: characters before those of the last token that was pushed, whatever is held back; a
    token that goes on with a character has the offset of the one that began it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """stop: texts, not empty. prompt: tokens before the answer; they decide whether its first
        word keeps the space before it."""
        self.offset = 0
        self._decode, self._bytes = tokenizer.decode, token_bytes(tokenizer)
        self._word = _word(tokenizer)
        self._stops = _Stops(stop)
        # The tokens that are decoded; what of their text was given out; tokens after it.
        self._window, self._sent, self._broken = self._begin(prompt)
        self._limit = len(self._window) + _LONG
        # Characters that were given out or may belong to a stop text; characters after these that
        # the next token may still change.
        self._certain, self._open = 0, self._decode(self._window)[len(self._sent) :]

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain now and was not given out before, and whether a stop text ended
        it. What follows a stop text is ignored."""
        if self._stops.found:
            return "", True
        self._window.append(int(token))
        text = self._text()
        self.offset = self._begins()
        held = _trailing(text)
        self._broken = self._broken + 1 if held else 0
        # A character has four bytes: one that is not whole after as many tokens never will be.
        if self._broken > _MISSING:
            held = min(held, _MISSING)
        new = self._take(text, len(text) - held)
        self._open = text[len(self._sent) :]
        if len(self._window) >= self._limit:
            self._cut(text)
        return self._stops.feed(new), self._stops.found

    def finish(self) -> str:
        """What was held back, after the last token. Nothing after a stop text."""
        text = self._text()
        return self._stops.feed(self._take(text, len(text))) + self._stops.rest()

    def _begin(self, prompt: Sequence[int]) -> tuple[list[int], str, int]:
        """The window before the first token: the last tokens of the prompt, as many as it takes to
        print whole characters; and what `_whole` says of it."""
        window, text, missing = list[int](), "", 0
        # One of the first four begins between characters; the last reaches over blanks.
        for number in (*(2 * _SHORT - i for i in range(_MISSING + 1)), 4 * _LONG):
            window = [int(token) for token in prompt[-number:]]
            text, missing = _whole(self._decode, window)
            if text.strip() and _UNKNOWN not in text:
                break
        return window, text, missing

    def _text(self) -> str:
        """The window's text, which begins with what was given out."""
        text = self._decode(self._window)
        if text.startswith(self._sent):
            return text
        # The last tokens have changed the text of earlier ones. They go on alone.
        alone = 1 + min(self._broken, _MISSING)
        self._window = [*self._word, *self._window[-alone:]]
        self._sent = self._decode(self._word)
        return self._decode(self._window)

    def _take(self, text: str, certain: int) -> str:
        new = text[len(self._sent) : certain]
        self._sent += new
        self._certain += len(new)
        return new

    def _begins(self) -> int:
        """Where the last token's own characters begin."""
        if not self._open:
            return self._certain
        *before, last = (self._bytes(token) for token in self._window[-1 - self._broken :])
        goes_on = _goes_on(b"".join(before), last)
        return self._certain if goes_on else self._certain + len(self._open)

    def _cut(self, text: str) -> None:
        """Drops tokens from the window's beginning where that changes nothing that follows."""
        waiting = len(text) - len(self._sent)
        next_word = self._decode([*self._window, *self._word])[len(text) :]
        for keep in range(_SHORT, len(self._window) // 2 + 1):
            tail = self._window[-keep:]
            # A word that prints something; while nothing did, a space may still be dropped.
            for first in (self._word, self._window[-keep - 1 : -keep]):
                before, whole = self._decode(first), self._decode([*first, *tail])
                rest = whole[len(before) :]
                same = whole.startswith(before) and text.endswith(rest) and len(rest) >= waiting
                if same and self._decode([*first, *tail, *self._word])[len(whole) :] == next_word:
                    self._window, self._sent = [*first, *tail], whole[: len(whole) - waiting]
                    self._limit = len(self._window) + _LONG
                    return
        # Rare. Trying again only when it has doubled keeps the cost of a token from growing.
        self._limit = 2 * len(self._window)


def text_before(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """The text of a prompt up to where the answer's begins: with `TextStream`'s it is the whole.

    A last character that is not whole is the answer's, which may complete it.
    """
    return _whole(tokenizer.decode, prompt)[0]


class _Stops:
    """Finds the first stop text in a text that comes in pieces; constant work for a character.

    The stop text that is complete first ends the text; of several at the same place the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        # Characters of each stop text that the text ends with.
        self._matched = [0] * len(self._stops)
        self._held = ""

    def feed(self, new: str) -> str:
        """What can be given out after `new`: all but a possible beginning of a stop text."""
        if self.found or not self._stops:
            return "" if self.found else new
        text = self._held + new
        for end, char in enumerate(new, len(self._held) + 1):
            complete = self._step(char)
            if complete:
                self.found = True
                self._held = ""
                return text[: end - complete]
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What is held back when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        """Length of the stop text that `char` completes, 0 for none (Knuth, Morris and Pratt)."""
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
    """For each beginning of `stop`: the longest shorter beginning that it ends with."""
    found, matched = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = found[matched - 1]
        matched += stop[i] == stop[matched]
        found[i] = matched
    return found


def _whole(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> tuple[str, int]:
    """The text without a last character that is not whole, and the number of its tokens."""
    for missing in range(min(_MISSING, len(tokens)) + 1):
        text = decode(tokens[: len(tokens) - missing])
        if not _trailing(text):
            return text, missing
    return decode(tokens), 0


def _trailing(text: str) -> int:
    return len(text) - len(text.rstrip(_UNKNOWN))


def _goes_on(before: bytes, last: bytes) -> bool:
    """Whether the first of the last bytes belongs to a character that those before it began."""
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
    """Tokens of a short word, which some tokenizers write with a space before it.

    The one of fewest tokens: a word that is spelled in bytes could merge with bytes beside it.
    """
    words = tokenizer.encode_batch(["a", "the", "e", "1", "o", "\u7684"])
    return tuple(int(token) for token in min(words, key=len))


@functools.lru_cache(maxsize=2**16)
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of one token in the middle of a text, where a leading space stays."""
    before = _word(tokenizer)
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
