"""Trains a byte-level BPE tokenizer on a corpus."""

from collections.abc import Iterable

from mor_jax.config import check

EOS = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and the end of a document."""


def train_bpe(texts: Iterable[str], vocab_size: int, setting: str = "--train-bpe") -> str:
    """Contents of a `tokenizer.json` with at most `vocab_size` tokens, trained on `texts`.

    Byte-level, so that every text can be written. A small corpus may give fewer tokens than asked
    for. Raises `ValueError` if `vocab_size` has no room for the bytes.
    """
    rule = f"must be at least {SMALLEST}: 256 bytes and the end of a document"
    check(vocab_size >= SMALLEST, setting, vocab_size, rule, "Try 32768")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)
