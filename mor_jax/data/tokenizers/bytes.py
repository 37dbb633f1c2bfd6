"""The byte tokenizer, and the characters that byte-level BPE vocabularies use for bytes."""

from collections.abc import Sequence

import numpy as np

from mor_jax.data.tokenizers.base import Tokenizer


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens. Byte 0 does not occur in text, so it serves as EOS.

    NUL characters in a text are dropped.
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
        """Text of the bytes; EOS and ids outside 1..255 are dropped."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        return bytes(ids[(ids > 0) & (ids < 256)].astype(np.uint8)).decode("utf-8", "replace")

    def files(self) -> dict[str, bytes]:
        """None: the tokenizer is built in."""
        return {}


def byte_letters() -> dict[int, str]:
    """The printable character for each byte in byte-level BPE vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
