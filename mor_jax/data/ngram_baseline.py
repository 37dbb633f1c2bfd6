"""N-gram baselines: losses of unigram and bigram models fitted to the same tokens."""

import numpy as np

from mor_jax.config.parsing import check

LARGEST = 4096
"""Largest vocabulary for which all pairs of tokens are counted in a table."""


def ngram_loss(
    train_tokens: np.ndarray, heldout_tokens: np.ndarray, order: int, vocab_size: int = 256
) -> float:
    """Cross-entropy of an n-gram model on validation tokens, in nats per token.

    order 1: add-one smoothed frequencies. order 2: bigrams with Witten-Bell smoothing (1991) by the
    unigram distribution: p(b|a) = (n(a,b) + t(a) p(b)) / (n(a) + t(a)), where t(a) is the number of
    distinct successors of a.
    Tokens are one-dimensional integer arrays. Raises `ValueError` on another order or a vocabulary
    too large for a table.
    """
    check(order in (1, 2), "order", order, "must be 1 or 2", "Use 2")
    rule = f"must be at most {LARGEST}, to count all pairs"
    check(vocab_size <= LARGEST, "vocab_size", vocab_size, rule, "Use the byte tokenizer")
    rule = "needs at least two tokens"
    check(min(len(train_tokens), len(heldout_tokens)) > 1, "tokens", "...", rule, "Add text")
    counts = np.bincount(train_tokens, minlength=vocab_size).astype(np.float64)
    unigram = (counts + 1) / (counts + 1).sum()
    if order == 1:
        seen = np.bincount(heldout_tokens[1:], minlength=vocab_size)
        return float(-(seen * np.log(unigram)).sum() / seen.sum())
    pairs = _pairs(train_tokens, vocab_size)
    followers = np.maximum((pairs > 0).sum(1, keepdims=True), 1)
    model = (pairs + followers * unigram[None]) / (pairs.sum(1, keepdims=True) + followers)
    seen = _pairs(heldout_tokens, vocab_size)
    return float(-(seen * np.log(model)).sum() / seen.sum())


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often b follows a, float64 [a, b]."""
    kind = np.int32 if vocab_size**2 < 2**31 else np.int64
    codes = tokens[:-1].astype(kind) * vocab_size + tokens[1:]
    table = np.bincount(codes, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    return table.astype(np.float64)
