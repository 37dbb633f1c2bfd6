"""Data: corpora, tokenizers, packing and batches. docs/data.md describes sources and settings."""

from mor_jax.data.loader import (
    Layout,
    TrainBatches,
    fingerprint,
    open_corpus,
    open_streams,
    position_of,
    train_batches,
    validation_batches,
    validation_sources,
)
from mor_jax.data.ngram_baseline import ngram_loss
from mor_jax.data.position import DataPosition, Jump, ahead, carried_over
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.load import check_vocabulary, load_tokenizer

__all__ = [
    "DataPosition",
    "Jump",
    "Layout",
    "Tokenizer",
    "TrainBatches",
    "ahead",
    "carried_over",
    "check_vocabulary",
    "fingerprint",
    "load_tokenizer",
    "ngram_loss",
    "open_corpus",
    "open_streams",
    "position_of",
    "train_batches",
    "validation_batches",
    "validation_sources",
]
