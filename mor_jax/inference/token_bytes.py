"""The bytes that single tokens stand for: of half a character too, which has no text."""

import functools
import json
import re
from collections.abc import Callable

from mor_jax.data.tokenizers.base import Tokenizer

# The two libraries are imported where they are needed: a model of bytes needs neither.
from mor_jax.data.tokenizers.bytes import ByteTokenizer, byte_letters

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.lru_cache(maxsize=16)
def token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Gives the bytes of UTF-8 for a token: with its leading space, special tokens by their name.

    Numbers without a token give b"".
    """
    files = tokenizer.files()
    if isinstance(tokenizer, ByteTokenizer):
        return lambda token: bytes([token]) if 0 <= token < 256 else b""
    if "tokenizer.json" in files:
        return functools.lru_cache(2**16)(_hugging_face(files["tokenizer.json"]))
    return functools.lru_cache(2**16)(_sentencepiece(files["tokenizer.model"]))


def _hugging_face(contents: bytes) -> Callable[[int], bytes]:
    from tokenizers import Tokenizer as Encoder

    encoder = Encoder.from_str(contents.decode("utf-8"))
    decoder = json.dumps(json.loads(contents).get("decoder"))
    read = _letters if '"ByteLevel"' in decoder else _spaced
    added = {number: token.content for number, token in encoder.get_added_tokens_decoder().items()}

    def find(token: int) -> bytes:
        if token in added:
            return added[token].encode()
        return read(encoder.id_to_token(token) or "") if token >= 0 else b""

    return find


def _sentencepiece(contents: bytes) -> Callable[[int], bytes]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(contents)
    size = pieces.vocab_size()
    return lambda token: _spaced(pieces.id_to_piece(token)) if 0 <= token < size else b""


def _spaced(piece: str) -> bytes:
    """`\u2581the` is ` the`, `<0xE2>` is that byte."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _letters(piece: str) -> bytes:
    """Each letter is a byte. A piece with other letters is text as it stands."""
    table = _byte_of_letter()
    if all(letter in table for letter in piece):
        return bytes(table[letter] for letter in piece)
    return piece.encode()


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in byte_letters().items()}
