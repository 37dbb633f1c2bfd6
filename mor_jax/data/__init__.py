"""Data: corpora, tokenizers, packing and batches. docs/data.md describes sources and settings."""

from mor_jax.data.loader import (
    Layout,
    TrainBatches,
    fingerprint,
    heldout_batches,
    heldout_sources,
    open_corpus,
    open_streams,
    place_of,
    train_batches,
)
from mor_jax.data.ngram_baseline import ngram_loss
from mor_jax.data.position import Jump, Place, ahead, carried_over
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.load import check_vocabulary, load_tokenizer

__all__ = [
    "Jump",
    "Layout",
    "Place",
    "Tokenizer",
    "TrainBatches",
    "ahead",
    "carried_over",
    "check_vocabulary",
    "fingerprint",
    "heldout_batches",
    "heldout_sources",
    "load_tokenizer",
    "ngram_loss",
    "open_corpus",
    "open_streams",
    "place_of",
    "train_batches",
]
