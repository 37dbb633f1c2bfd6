"""Bytes of text per target, so that losses can be compared across tokenizers.

Bits per byte is the loss of all targets, end-of-document tokens included, divided by the bytes of
the text: end-of-document tokens add to the loss, but stand for no bytes.
"""

import numpy as np

from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.token_bytes import token_bytes
from mor_jax.types import IGNORE, Batch


class TextBytes:
    """Counts the exact UTF-8 bytes of the text, after the tokenizer's normalisation.

    The space that some tokenizers add before the first word counts as no byte.
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
        """Bytes and end-of-document tokens among the targets of each sequence: int64 [b] each."""
        targets = np.asarray(batch.targets)
        valid = targets != IGNORE
        known = np.where(valid, targets, self._eos)
        begins = np.asarray(batch.tokens) == self._eos
        lengths = self._lengths[known] - np.where(begins, self._spaced[known], 0)
        return np.sum(lengths * valid, axis=1), np.sum(valid & (targets == self._eos), axis=1)
