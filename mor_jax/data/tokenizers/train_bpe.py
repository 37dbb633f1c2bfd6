"""Trains a byte-level BPE tokenizer on a corpus."""

from collections.abc import Iterable

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check

EOS = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and the end of a document."""
LARGEST = 2**22
"""Far more than models have. The library takes 57 bytes for each at once, and aborts without."""


def check_size(vocab_size: int, setting: str = "--train-bpe") -> None:
    """Raises `ValueError` unless a vocabulary may have so many tokens."""
    rule = f"must be at least {SMALLEST}: 256 bytes and the end of a document"
    check(vocab_size >= SMALLEST, setting, vocab_size, rule, "Try 32768")
    rule = f"must be at most {LARGEST:,}: memory for so many tokens is taken before the first"
    check(vocab_size <= LARGEST, setting, vocab_size, rule, "Try 32768")


def train_bpe(texts: Iterable[str], vocab_size: int, setting: str = "--train-bpe") -> str:
    """Contents of a `tokenizer.json` with at most `vocab_size` tokens, trained on `texts`.

    Byte-level, so that every text can be written. A small corpus may give fewer tokens than asked
    for. Raises `ValueError` if `vocab_size` is out of range.
    """
    check_size(vocab_size, setting)
    library = require_package("tokenizers", setting, str(vocab_size))
    byte_level = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)
