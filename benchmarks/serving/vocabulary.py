"""A real tokenizer of any size, so that detokenisation costs what it costs."""

import sysconfig
from pathlib import Path

from mor_jax.data import load_tokenizer
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.train_bpe import train_bpe

_FILES = 400


def tokenizer_of(vocab_size: int, directory: Path) -> Tokenizer:
    """Byte-level BPE with `vocab_size` tokens, trained on Python's library; kept in `directory`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))[:_FILES]
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    path = directory / "tokenizer.json"
    path.write_text(train_bpe(texts, vocab_size))
    return load_tokenizer(str(path))
