"""How many bytes of text the targets of a row stand for, so that losses compare across tokenizers.

A loss in bits per byte is the cost of all targets, those that end documents too, over the bytes of
the text alone: an end of document costs what it costs, but no byte of a text stands for it.
"""

import numpy as np

from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.token_bytes import token_bytes
from mor_jax.types import IGNORE, Batch


class TextBytes:
    """Counts bytes of UTF-8, exactly: of the text as the tokenizer keeps it.

    A tokenizer that writes a space before a text's first word has it there without a byte.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        find = token_bytes(tokenizer)
        tokens = range(tokenizer.vocab_size)
        self._eos = tokenizer.eos_id
        self._lengths = np.array([len(find(token)) for token in tokens], np.int64)
        self._lengths[self._eos] = 0
        self._spaced = np.zeros(tokenizer.vocab_size, np.int64)
        first = tokenizer.encode("a")
        if len(first) and find(int(first[0])).startswith(b" "):
            self._spaced[:] = [find(token).startswith(b" ") for token in tokens]

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Bytes, and ends of documents, among the targets of each row: int64 [b] each."""
        targets = np.asarray(batch.targets)
        here = targets != IGNORE
        known = np.where(here, targets, self._eos)
        begins = np.asarray(batch.tokens) == self._eos
        lengths = self._lengths[known] - np.where(begins, self._spaced[known], 0)
        return np.sum(lengths * here, axis=1), np.sum(here & (targets == self._eos), axis=1)
