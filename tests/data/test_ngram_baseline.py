"""n-gram losses against direct computation, and on the standard library."""

import math

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.data import ngram_loss, open_streams


def test_uniform_tokens_give_the_logarithm_of_the_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 16, 200_000).astype(np.uint16)
    for order in (1, 2):
        loss = ngram_loss(tokens[:100_000], tokens[100_000:], order, 16)
        assert abs(loss - math.log(16)) < 0.005


def test_bigram_by_hand():
    train = np.array([0, 1, 0, 1, 0, 2], np.uint16)
    unigram = np.array([4, 3, 2]) / 9
    after_zero = (np.array([0, 2, 1]) + 2 * unigram) / 5
    after_one = (np.array([2, 0, 0]) + 1 * unigram) / 3
    expected = -(math.log(after_zero[2]) + math.log(unigram[1]) + math.log(after_one[0])) / 3
    # token 2 was never followed by anything: all its weight is the prior's
    heldout = np.array([0, 2, 1, 0], np.uint16)
    assert ngram_loss(train, heldout, 2, 3) == pytest.approx(expected, rel=1e-12)


def test_standard_library_is_learnable(byte_tokenizer):
    [train] = open_streams(DataConfig(), byte_tokenizer, "train")
    [heldout] = open_streams(DataConfig(), byte_tokenizer, "heldout")
    assert len(train) > 5_000_000 and len(heldout) > 50_000
    unigram, bigram = (ngram_loss(train.tokens, heldout.tokens, order) for order in (1, 2))
    assert 2.9 < unigram < 3.6 and 2.2 < bigram < unigram - 0.5


def test_bad_arguments():
    tokens = np.arange(10, dtype=np.uint16)
    with pytest.raises(ValueError, match="order=3"):
        ngram_loss(tokens, tokens, 3)
    with pytest.raises(ValueError, match="vocab_size=49152"):
        ngram_loss(tokens, tokens, 2, 49152)
    with pytest.raises(ValueError, match="at least two tokens"):
        ngram_loss(tokens, tokens[:1], 1)
