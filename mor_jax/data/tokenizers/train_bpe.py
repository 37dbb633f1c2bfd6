"""Trains a byte-level BPE tokenizer on a corpus."""

from collections.abc import Iterable

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check

EOS = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and EOS."""
LARGEST = 2**22
"""Far more than any model has. The library allocates 57 bytes per token at once, or aborts."""


def check_size(vocab_size: int, setting: str = "--train-bpe") -> None:
    """Raises `ValueError` if a vocabulary size is out of range."""
    rule = f"must be at least {SMALLEST}: 256 bytes and the end of a document"
    check(vocab_size >= SMALLEST, setting, vocab_size, rule, "Try 32768")
    rule = f"must be at most {LARGEST:,}: training allocates memory for all tokens at once"
    check(vocab_size <= LARGEST, setting, vocab_size, rule, "Try 32768")


def train_bpe(texts: Iterable[str], vocab_size: int, setting: str = "--train-bpe") -> str:
    """Contents of a `tokenizer.json` with at most `vocab_size` tokens, trained on `texts`.

    Byte-level, so that it can encode any text. A small corpus may give fewer tokens than requested.
    Raises `ValueError` if `vocab_size` is out of range.
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
