"""The interface of tokenizers: text to token ids and back."""

import abc
from collections.abc import Sequence

import numpy as np


class Tokenizer(abc.ABC):
    """A fixed map between text and tokens. Two are equal when their fingerprints are.

    name: the argument of `load_tokenizer`.
    vocab_size: one more than the largest token id.
    eos_id: the token that ends every document.
    fingerprint: short hash of everything that determines the tokens of a text.
    """

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds every token: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, one-dimensional arrays of `dtype`, without special tokens."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens. Never raises: invalid bytes become U+FFFD or are dropped."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name; `load_tokenizer` takes the first one."""

    def encode(self, text: str) -> np.ndarray:
        """Tokens of one text, one-dimensional of `dtype`, without special tokens."""
        return self.encode_batch([text])[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)
