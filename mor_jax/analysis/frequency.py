"""Frequency of each token in a run's training text."""

import numpy as np

from mor_jax import data
from mor_jax.config import DataConfig
from mor_jax.data.tokenizers.base import Tokenizer

MAX_TOKENS = 2**24
"""Most tokens counted per source. Of a longer one, chunks spread evenly over it are counted."""

_CHUNK = 2**16


def token_shares(cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Share of each token in the training split, sources mixed by weight: float64 [v], sum 1.

    Raises `ValueError` if the text cannot be read.
    """
    streams = data.open_streams(cfg, tokenizer, "train")
    total = np.zeros(vocab_size)
    for stream, weight in zip(streams, cfg.weights or (1.0,) * len(streams), strict=True):
        counts = np.zeros(vocab_size)
        num_chunks = -(-len(stream) // _CHUNK)
        num_read = min(num_chunks, MAX_TOKENS // _CHUNK)
        for index in range(num_read):
            start = index * num_chunks // num_read * _CHUNK
            tokens = stream.read(start, min(start + _CHUNK, len(stream)))
            counts += np.bincount(tokens.astype(np.int64), minlength=vocab_size)[:vocab_size]
        total += weight * counts / max(counts.sum(), 1)
    return total / total.sum()
