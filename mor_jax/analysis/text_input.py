"""What is analysed: a text of the user's, or rows of a data source, as batches of one shape."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mor_jax import data
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check, fail
from mor_jax.data.sources import compressed, records
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.types import IGNORE, Batch

MOST_TOKENS = 2**23
"""Tokens that one analysis may hold: about half a gigabyte of what is kept of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
    """Which text to analyse; nothing given: the held-out part of the run's own.

    text: a file, "-" for the standard input. prompt: a text itself. sources: all of these, written
    as `data.sources`. tokens: at most so many. length: tokens of a row; None: the run's. window:
    cut a text longer than the context into rows of that length. batch_size: rows of a pass; None:
    the run's.
    """

    text: str | None = None
    prompt: str | None = None
    sources: tuple[str, ...] | None = None
    tokens: int = 65_536
    length: int | None = None
    window: bool = False
    batch_size: int | None = None

    def validate(self) -> None:
        """Raises `ValueError` for more than one text, or numbers out of range."""
        given = [name for name in ("text", "prompt", "sources") if getattr(self, name) is not None]
        rule, fix = f"is one of several texts: {' and '.join(given)}", "Give one of them"
        check(len(given) < 2, given[-1] if given else "text", self._value(given), rule, fix)
        rule = f"must be in 1 .. {MOST_TOKENS:,}, which is what fits in memory"
        check(0 < self.tokens <= MOST_TOKENS, "tokens", self.tokens, rule, "Try 65536")
        for name in ("length", "batch_size"):
            value = getattr(self, name)
            rule = "must be greater than 0"
            check(value is None or value > 0, name, value, rule, "Leave it out")

    def _value(self, given: list[str]) -> object:
        return getattr(self, given[-1]) if given else None


@dataclasses.dataclass(frozen=True)
class TokenBatches:
    """Rows to analyse, in batches of one shape.

    name: for people. batches: NumPy. fresh: for each, the tokens [b l] that count; the others are
    padding, repetitions, or stand in another window too. joined: the rows follow each other in one
    text. notes: what has to be said about it.
    """

    name: str
    batches: list[Batch]
    fresh: list[np.ndarray]
    joined: bool
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.fresh[0].shape[1]

    @property
    def digest(self) -> str:
        """Short hash of the tokens."""
        found = hashlib.blake2b(digest_size=8)
        for batch, fresh in zip(self.batches, self.fresh, strict=True):
            found.update(np.asarray(batch.tokens)[fresh].tobytes())
        return found.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(int(fresh.sum()) for fresh in self.fresh)


def read(
    cfg: TrainConfig, tokenizer: Tokenizer, wanted: TextRequest, stdin: Callable[[], bytes]
) -> TokenBatches:
    """The rows of what is `wanted`.

    cfg: of the run. stdin: reads all of the standard input.

    Raises:
        ValueError: a file that cannot be read or is no text, a text that is empty or longer than
            the context, a source that does not fit the run.
    """
    wanted.validate()
    data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    length, longest = wanted.length or cfg.seq_len, cfg.model.max_seq_len
    rule = f"the model's context is model.max_seq_len={longest} tokens"
    check(length <= longest, "length", length, rule, f"Use at most {longest}")
    if wanted.text is None and wanted.prompt is None:
        return _of_sources(cfg, tokenizer, wanted, length)
    setting, name = ("prompt", "the prompt") if wanted.text is None else ("text", wanted.text)
    if wanted.text is None:
        text = utf8("prompt", wanted.prompt or "", "Give it as a file with --text")
    else:
        text = _file(wanted.text, stdin)
    tokens = tokenizer.encode(text).astype(np.int32)
    shown = text[:40] if wanted.text is None else wanted.text
    rule = "holds no tokens"
    check(len(tokens) > 0, setting, shown, rule, "Give some text")
    notes: list[str] = []
    if len(tokens) > longest and not wanted.window:
        rule = f"has {len(tokens):,} tokens, the model's context is model.max_seq_len={longest}"
        fix = f"Shorten it, or cut it into windows of {length} tokens with --window"
        fail(setting, shown, rule, fix)
    if len(tokens) > wanted.tokens:
        notes.append(f"the first {wanted.tokens:,} of {len(tokens):,} tokens (--tokens)")
        tokens = tokens[: wanted.tokens]
    if wanted.window and len(tokens) > length:
        notes.append(f"windows of {length} tokens, each read without those before it")
    else:
        length = len(tokens)
    batch_size = wanted.batch_size or cfg.eval.batch_size
    parts = list(_windows(tokens, length, batch_size))
    batches = [Batch(row, target) for row, target, _ in parts]
    called = "the standard input" if name == "-" else name
    return TokenBatches(called, batches, [fresh for _, _, fresh in parts], True, tuple(notes))


def utf8(setting: str, text: str, fix: str) -> str:
    """Shells hand on bytes that are no text as halves of surrogate pairs; those are refused."""
    ok = not any("\ud800" <= char <= "\udfff" for char in text)
    check(ok, setting, text, "is not UTF-8", fix)
    return text


def _file(name: str, stdin: Callable[[], bytes]) -> str:
    if name == "-":
        raw = stdin()
    else:
        try:
            raw = Path(name).expanduser().read_bytes()
        except OSError as error:
            fix = "Give another file, '-' for the standard input, or --prompt=TEXT"
            fail("text", name, f"cannot be read ({error.strerror})", fix)
    records.check_head(raw[: compressed.HEAD], name, "text")
    text = records.decode(raw.removeprefix(records.MARK), name, "text")
    at = text.find("\0")
    rule = f"holds a NUL character at offset {at}, so it is no text"
    check(at < 0, "text", name, rule, "Give a text")
    return text


def _windows(
    tokens: np.ndarray, length: int, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, targets and which count, int32 and bool [b l]; the last window reaches back.

    So every row is full: top-k routing chooses a share of the whole row, padding would widen it.
    """
    starts = [min(start, len(tokens) - length) for start in range(0, len(tokens), length)]
    following = np.append(tokens[1:], IGNORE).astype(np.int32)
    size = min(most, len(starts))
    for first in range(0, len(starts), size):
        here = starts[first : first + size]
        rows = [*here, *[0] * (size - len(here))]
        fresh = np.zeros((size, length), bool)
        for row, start in enumerate(here):
            fresh[row, (first + row) * length - start :] = True
        at = np.array(rows)[:, None] + np.arange(length)[None]
        yield tokens[at], following[at], fresh


def _of_sources(
    cfg: TrainConfig, tokenizer: Tokenizer, wanted: TextRequest, length: int
) -> TokenBatches:
    text, split = cfg.data, "heldout"
    if wanted.sources is not None:
        text, split = dataclasses.replace(text, sources=wanted.sources, weights=None), "all"
    # At most so many tokens are at most so many of one row.
    shorter, length = wanted.tokens < length, min(wanted.tokens, length)
    rows = wanted.tokens // length
    size = min(wanted.batch_size or cfg.eval.batch_size, rows)
    layout = data.Layout(length=length, batch_size=size)
    batches = data.validation_batches(text, tokenizer, layout, -(-rows // size), split, 1)
    fresh, left = [], rows
    for batch in batches:
        here = np.any(batch.targets != IGNORE, axis=1)
        here &= np.cumsum(here) <= left
        left -= int(here.sum())
        whole = np.repeat(here[:, None], length, axis=1)
        fresh.append(whole if batch.segments is None else whole & (batch.segments > 0))
    names = ", ".join(text.sources)
    name = f"held-out part of {names}" if split == "heldout" else names
    notes = ()
    if shorter:
        notes = (f"one row, shorter than usual (--tokens={wanted.tokens})",)
    elif left == 0:
        told = f"{rows:,} rows of {length} tokens, spread over the text (--tokens={wanted.tokens})"
        notes = (told,)
    return TokenBatches(name, batches, fresh, False, notes)
