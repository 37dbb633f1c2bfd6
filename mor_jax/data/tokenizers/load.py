"""Loads a tokenizer by name or path."""

from collections.abc import Sequence
from pathlib import Path

from mor_jax.config.parsing import check, fail
from mor_jax.data.tokenizers import subword
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.bytes import ByteTokenizer


def load_tokenizer(name: str, setting: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer `name`: `bytes`, or a path.

    Paths: a Hugging Face `tokenizer.json`, a SentencePiece `.model`, or a directory that contains
    `tokenizer.json` or `tokenizer.model`. setting: its setting, for errors. Raises `ValueError`.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [path / f for f in ("tokenizer.json", "tokenizer.model") if (path / f).exists()]
        rule = "the directory holds neither tokenizer.json nor tokenizer.model"
        check(bool(inside), setting, name, rule, "Give the path of the tokenizer's file")
        path = inside[0]
    if not path.is_file():
        rule = "is neither 'bytes' nor an existing file or directory"
        fix = "Give the path of a tokenizer.json or of a SentencePiece .model"
        fail(setting, name, rule, fix)
    if path.suffix == ".model":
        return subword.SentencePieceTokenizer(name, path, setting)
    return subword.HuggingFaceTokenizer(name, path, setting)


def files_beside(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The files among `names` that exist in the directory `path`, or next to the file `path`."""
    directory = path if path.is_dir() else path.parent
    paths = [directory / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ValueError` unless `vocab_size` covers every token."""
    rule = f"must be at least {tokenizer.vocab_size}, the vocabulary size of data.tokenizer="
    rule += repr(tokenizer.name)
    padded = -(-tokenizer.vocab_size // 128) * 128
    fix = f"Set model.vocab_size={padded} (a multiple of 128) or choose a smaller tokenizer"
    check(vocab_size >= tokenizer.vocab_size, "model.vocab_size", vocab_size, rule, fix)
