"""Text to token numbers and back: the interface, the byte tokenizer, and the choice by name."""

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mor_jax.config.parsing import check, fail


class Tokenizer(abc.ABC):
    """A fixed map between text and tokens. Two are equal when their fingerprints are.

    name: what `load_tokenizer` was given.
    vocab_size: one more than the largest token number.
    eos_id: the token that ends every document.
    fingerprint: short hash of everything that decides what tokens a text becomes.
    """

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds every token: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, one-dimensional arrays of `dtype`, without any special token."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens. Never raises: what is no text becomes U+FFFD or is left out."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Files that make up the tokenizer, by name; `load_tokenizer` takes the first one."""

    def encode(self, text: str) -> np.ndarray:
        """Tokens of one text, one-dimensional of `dtype`, without any special token."""
        return self.encode_batch([text])[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as tokens, 256 in all. Byte 0 never occurs in text, so it ends documents.

    A NUL character inside a text is left out.
    """

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 256
        self.eos_id = 0
        self.fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Bytes of each text as uint16. Lone surrogates become question marks."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        raw = text.encode("utf-8", errors="replace")
        if b"\0" in raw:
            raw = raw.replace(b"\0", b"")
        return np.frombuffer(raw, np.uint8).astype(self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the bytes; document ends and numbers outside 1..255 are left out."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        return bytes(ids[(ids > 0) & (ids < 256)].astype(np.uint8)).decode("utf-8", "replace")

    def files(self) -> dict[str, bytes]:
        """None: the tokenizer is built in."""
        return {}


def load_tokenizer(name: str, setting: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer called `name`: `bytes`, or a path.

    Paths: a Hugging Face `tokenizer.json`, a SentencePiece `.model`, or a directory that holds
    `tokenizer.json` or `tokenizer.model`. `setting` is what errors call it. Raises `ValueError`.
    """
    if name == "bytes":
        return ByteTokenizer()
    # Deferred: these bring libraries that a run on bytes never needs.
    from mor_jax.data.tokenizers import subword

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
    """Those files of `names` that stand in the directory `path`, or beside the file `path`."""
    directory = path if path.is_dir() else path.parent
    paths = [directory / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ValueError` unless a model with `vocab_size` embeddings can read every token."""
    rule = f"must be at least {tokenizer.vocab_size}, the tokens of data.tokenizer="
    rule += repr(tokenizer.name)
    padded = -(-tokenizer.vocab_size // 128) * 128
    fix = f"Set model.vocab_size={padded} (a multiple of 128) or choose a smaller tokenizer"
    check(vocab_size >= tokenizer.vocab_size, "model.vocab_size", vocab_size, rule, fix)
