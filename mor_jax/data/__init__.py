"""Data: sources, tokenizers, packing and batches. See docs/data.md."""

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
from mor_jax.data.position import DataPosition, SkippedRange, advance, resume_position
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.load import check_vocabulary, load_tokenizer

__all__ = [
    "DataPosition",
    "Layout",
    "SkippedRange",
    "Tokenizer",
    "TrainBatches",
    "advance",
    "check_vocabulary",
    "fingerprint",
    "load_tokenizer",
    "ngram_loss",
    "open_corpus",
    "open_streams",
    "position_of",
    "resume_position",
    "train_batches",
    "validation_batches",
    "validation_sources",
]
