"""The text of an analysis: a file, a prompt or a data source, as batches of one shape."""

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

MAX_TOKENS = 2**23
"""Most tokens of one analysis: their records take about half a gigabyte of host memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
    """The text to analyse; by default the run's validation split.

    text: a file, "-" for the standard input. prompt: the text itself. sources: written like
    `data.sources`. At most one of the three is set. tokens: the largest number of tokens. length:
    sequence length in tokens; None: the run's. window: cut a text longer than the context into
    sequences of that length. batch_size: sequences per batch; None: the run's.
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
        set_fields = [
            name for name in ("text", "prompt", "sources") if getattr(self, name) is not None
        ]
        rule = f"an analysis reads one text, but {' and '.join(set_fields)} are set"
        fix = "Give one of them"
        if len(set_fields) > 1:
            fail(set_fields[-1], getattr(self, set_fields[-1]), rule, fix)
        rule = f"must be in 1 .. {MAX_TOKENS:,}, which is what fits in memory"
        check(0 < self.tokens <= MAX_TOKENS, "tokens", self.tokens, rule, "Try 65536")
        for name in ("length", "batch_size"):
            value = getattr(self, name)
            rule = "must be greater than 0"
            check(value is None or value > 0, name, value, rule, "Leave it out")


@dataclasses.dataclass(frozen=True)
class TokenBatches:
    """Sequences to analyse, in batches of one shape.

    name: for titles. batches: NumPy arrays. counted: bool [b l] for each, the tokens that count;
    the others are padding or belong to another window as well. contiguous: the sequences are
    consecutive parts of one text. notes: lines for the report.
    """

    name: str
    batches: list[Batch]
    counted: list[np.ndarray]
    contiguous: bool
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.counted[0].shape[1]

    @property
    def digest(self) -> str:
        """Short hash of the tokens."""
        hasher = hashlib.blake2b(digest_size=8)
        for batch, counted in zip(self.batches, self.counted, strict=True):
            hasher.update(np.asarray(batch.tokens)[counted].tobytes())
        return hasher.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(int(counted.sum()) for counted in self.counted)


def read_sequences(
    cfg: TrainConfig, tokenizer: Tokenizer, request: TextRequest, stdin: Callable[[], bytes]
) -> TokenBatches:
    """The sequences of the requested text.

    cfg: of the run. stdin: reads all of the standard input.

    Raises:
        ValueError: a file that cannot be read or is not text, a text that is empty or longer than
            the context, a source that does not fit the run.
    """
    request.validate()
    data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    length, max_length = request.length or cfg.seq_len, cfg.model.max_seq_len
    rule = f"the model's context is model.max_seq_len={max_length} tokens"
    check(length <= max_length, "length", length, rule, f"Use at most {max_length}")
    if request.text is None and request.prompt is None:
        return _from_sources(cfg, tokenizer, request, length)
    setting, name = ("prompt", "the prompt") if request.text is None else ("text", request.text)
    if request.text is None:
        text = utf8("prompt", request.prompt or "", "Give it as a file with --text")
    else:
        text = _read_file(request.text, stdin)
    tokens = tokenizer.encode(text).astype(np.int32)
    excerpt = text[:40] if request.text is None else request.text
    rule = "holds no tokens"
    check(len(tokens) > 0, setting, excerpt, rule, "Give some text")
    notes: list[str] = []
    if len(tokens) > max_length and not request.window:
        rule = f"has {len(tokens):,} tokens, the model's context is model.max_seq_len={max_length}"
        fix = f"Shorten it, or cut it into windows of {length} tokens with --window"
        fail(setting, excerpt, rule, fix)
    if len(tokens) > request.tokens:
        notes.append(f"the first {request.tokens:,} of {len(tokens):,} tokens (--tokens)")
        tokens = tokens[: request.tokens]
    if request.window and len(tokens) > length:
        notes.append(f"windows of {length} tokens, each read without the ones before it")
    else:
        length = len(tokens)
    batch_size = request.batch_size or cfg.eval.batch_size
    windows = list(_windows(tokens, length, batch_size))
    batches = [Batch(row, target) for row, target, _ in windows]
    title = "the standard input" if name == "-" else name
    return TokenBatches(title, batches, [counted for _, _, counted in windows], True, tuple(notes))


def utf8(setting: str, text: str, fix: str) -> str:
    """Returns `text`. Raises `ValueError` for bytes that are not UTF-8.

    A shell passes such bytes on as lone surrogates.
    """
    ok = not any("\ud800" <= char <= "\udfff" for char in text)
    check(ok, setting, text, "is not UTF-8", fix)
    return text


def _read_file(name: str, stdin: Callable[[], bytes]) -> str:
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
    rule = f"holds a NUL character at offset {at}, so it is not text"
    check(at < 0, "text", name, rule, "Give a text file")
    return text


def _windows(
    tokens: np.ndarray, length: int, max_batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields tokens, targets (int32 [b l]) and the mask of tokens that count (bool [b l]).

    The last window overlaps the one before, so that every sequence is full: the capacity of top-k
    routing is a fraction of the sequence, padding included.
    """
    starts = [min(start, len(tokens) - length) for start in range(0, len(tokens), length)]
    following = np.append(tokens[1:], IGNORE).astype(np.int32)
    size = min(max_batch_size, len(starts))
    for first in range(0, len(starts), size):
        batch_starts = starts[first : first + size]
        padded = [*batch_starts, *[0] * (size - len(batch_starts))]
        counted = np.zeros((size, length), bool)
        for row, start in enumerate(batch_starts):
            counted[row, (first + row) * length - start :] = True
        index = np.array(padded)[:, None] + np.arange(length)[None]
        yield tokens[index], following[index], counted


def _from_sources(
    cfg: TrainConfig, tokenizer: Tokenizer, request: TextRequest, length: int
) -> TokenBatches:
    text, split = cfg.data, "heldout"
    if request.sources is not None:
        text, split = dataclasses.replace(text, sources=request.sources, weights=None), "all"
    # A limit below the sequence length shortens the sequence.
    is_short, length = request.tokens < length, min(request.tokens, length)
    num_sequences = request.tokens // length
    size = min(request.batch_size or cfg.eval.batch_size, num_sequences)
    layout = data.Layout(length=length, batch_size=size)
    batches = data.validation_batches(text, tokenizer, layout, -(-num_sequences // size), split, 1)
    counted, remaining = [], num_sequences
    for batch in batches:
        present = np.any(batch.targets != IGNORE, axis=1)
        present &= np.cumsum(present) <= remaining
        remaining -= int(present.sum())
        mask = np.repeat(present[:, None], length, axis=1)
        counted.append(mask if batch.segments is None else mask & (batch.segments > 0))
    names = ", ".join(text.sources)
    name = f"validation part of {names}" if split == "heldout" else names
    notes = ()
    if is_short:
        notes = (f"one sequence, shorter than the run's (--tokens={request.tokens})",)
    elif remaining == 0:
        note = f"{num_sequences:,} sequences of {length} tokens, spread over the text"
        notes = (f"{note} (--tokens={request.tokens})",)
    return TokenBatches(name, batches, counted, False, notes)
