"""Token streams: the concatenated documents of one split, each followed by EOS.

A stream is in memory (tokenised at start) or in shards on disk (prepared beforehand).
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from mor_jax.config.parsing import check
from mor_jax.data.sources.documents import Documents
from mor_jax.data.streams.validation_split import text_hash, validation_mask
from mor_jax.data.tokenizers.base import Tokenizer

Key = TypeVar("Key")

BATCH_CHARACTERS = 4 * 2**20
"""Characters of text per call of the tokenizer."""

MEMORY_LIMIT = 2 * 2**30
"""Largest number of characters of a source that is tokenised into memory."""


class TokenStream(abc.ABC):
    """The tokens of one split of one source.

    name: the source, as configured. setting: its setting, for errors.
    fingerprint: hash that changes with the tokens.
    """

    name: str
    setting: str
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of tokens, including EOS."""

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens at positions `start` .. `stop - 1`."""

    @abc.abstractmethod
    def cuts(self, start: int, stop: int) -> np.ndarray:
        """Positions strictly between `start` and `stop` at which a document begins, ascending."""


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryStream(TokenStream):
    """Tokens in one array; `ends` holds the position after each document's EOS, ascending."""

    name: str
    setting: str
    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStream.read`."""
        return self.tokens[start:stop]

    def cuts(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStream.cuts`."""
        first, last = np.searchsorted(self.ends, [start + 1, stop])
        return self.ends[first:last]

    @functools.cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hash of the tokens and of the ends of documents."""
        digest = hashlib.blake2b(self.tokens.data, digest_size=16)
        digest.update(self.ends.data)
        return digest.hexdigest()


def join(arrays: Sequence[np.ndarray], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates documents with EOS after each: tokens of `tokenizer.dtype`, and ends, int64."""
    ends = np.cumsum([len(array) + 1 for array in arrays], dtype=np.int64)
    tokens = np.full(ends[-1] if len(arrays) else 0, tokenizer.eos_id, tokenizer.dtype)
    for array, end in zip(arrays, ends, strict=True):
        tokens[end - 1 - len(array) : end - 1] = array
    return tokens, ends


def encoded(
    texts: Iterable[tuple[Key, str]], tokenizer: Tokenizer
) -> Iterator[tuple[Key, str, np.ndarray]]:
    """Yields (key, text, tokens) of every non-empty text, in order, tokenised in batches."""
    pending: list[tuple[Key, str]] = []
    size = 0
    for key, text in texts:
        if text:
            pending.append((key, text))
            size += len(text)
        if size >= BATCH_CHARACTERS:
            yield from _encode_pending(pending, tokenizer)
            pending, size = [], 0
    yield from _encode_pending(pending, tokenizer)


def _encode_pending(
    pending: list[tuple[Key, str]], tokenizer: Tokenizer
) -> Iterator[tuple[Key, str, np.ndarray]]:
    arrays = tokenizer.encode_batch([text for _, text in pending])
    for (key, text), tokens in zip(pending, arrays, strict=True):
        yield key, text, tokens


def tokenize(
    documents: Documents, tokenizer: Tokenizer, validation_fraction: float | None
) -> dict[str, MemoryStream]:
    """Reads and tokenises a source into streams `train` and `heldout`; without a share into `all`.

    Raises `ValueError` if it has too few documents for both, or too much text for memory.
    """
    arrays: list[np.ndarray] = []
    hashes: list[int] = []
    characters = 0
    rule = f"has more than {MEMORY_LIMIT / 2**30:.0f} Gi characters, too many to tokenise in memory"
    fix = f"Prepare shards once: mor prepare-data --source={documents.spec} "
    fix += f"--tokenizer={tokenizer.name} --output=DIR, then use 'shards:DIR'"
    # Files far beyond the limit fail at once instead of after minutes of reading.
    check(documents.size <= 2 * MEMORY_LIMIT, documents.setting, documents.spec, rule, fix)
    for _, text, tokens in encoded(enumerate(documents.read(0)), tokenizer):
        characters += len(text)
        check(characters <= MEMORY_LIMIT, documents.setting, documents.spec, rule, fix)
        arrays.append(tokens)
        hashes.append(text_hash(text))
    masks = {"all": np.ones(len(arrays), bool)}
    if validation_fraction is not None:
        validation = validation_mask(hashes, validation_fraction, documents.setting, documents.spec)
        masks = {"train": ~validation, "heldout": validation}
    streams = {}
    for split, mask in masks.items():
        tokens, ends = join([arrays[i] for i in np.flatnonzero(mask)], tokenizer)
        streams[split] = MemoryStream(documents.spec, documents.setting, tokens, ends)
    return streams
