"""A run's tokenizer as the files that `AutoTokenizer.from_pretrained` reads, with the same tokens.

Whatever the tokenizer was, the export has a tokenizer.json, and names the class that takes it as it
stands: classes of single models would rebuild parts of it by rules of their own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.convert.tokenizers.sentencepiece import (
    Kind,
    SentencePieceVocab,
    files_of,
    tokenizer_of,
)
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.bytes import ByteTokenizer, byte_letters
from mor_jax.data.tokenizers.load import files_beside

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that may lie beside a tokenizer and belong to it."""

CONFIG = "tokenizer_config.json"
BYTES_EOS = "<|endoftext|>"
"""Name of token 0 of the byte tokenizer, which ends documents and stands for no byte of a text."""

_SPECIALS = ("bos", "eos", "pad", "unk")
_ALGORITHMS = {1: "unigram", 2: "bpe"}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files for an exported model, by name.

    A tokenizer.json comes with what lies beside it (chat template, generation settings). A
    SentencePiece model is rewritten as one, and comes along (of a unigram model, readings of a text
    that are equally likely may be told apart differently). Bytes become a byte-level vocabulary.

    Raises:
        ValueError: a SentencePiece model of a kind that tokenizer.json cannot express.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return files_of(_bytes(), _paddable({"eos_token": BYTES_EOS}))
    held = tokenizer.files()
    beside = files_beside(Path(tokenizer.name).expanduser(), TOKENIZER_FILES)
    if "tokenizer.json" in held:
        files = beside | held
        files[CONFIG] = _told(tokenizer, files)
        return files
    built, names = _from_sentencepiece(held["tokenizer.model"], tokenizer.name)
    told = {f"{role}_token": text for role, text in names.items()}
    return beside | held | files_of(built, _paddable(told))


def special_ids(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that the tokenizer has.

    files: `tokenizer_files` of it.
    """
    loaded = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    told = json.loads(files[CONFIG])
    found = {
        role: loaded.token_to_id(_content(told.get(f"{role}_token"))) for role in _SPECIALS[:3]
    }
    found["eos"] = tokenizer.eos_id
    return {f"{role}_token_id": number for role, number in found.items() if number is not None}


def _content(token: Any) -> str:
    # Written as a text or as a group of settings; nothing has the empty text.
    return token["content"] if isinstance(token, Mapping) else token or ""


def _told(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> bytes:
    """tokenizer_config.json that makes every release take tokenizer.json as it stands."""
    told = json.loads(files.get(CONFIG, b"{}"))
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Releases since 5 write a list under a name where those before expect a group.
    if isinstance(told.get("extra_special_tokens"), list):
        told.setdefault("additional_special_tokens", told.pop("extra_special_tokens"))
    told.pop("auto_map", None)
    told.pop("backend", None)
    loaded = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    if loaded.token_to_id(_content(told.get("eos_token"))) != tokenizer.eos_id:
        told["eos_token"] = loaded.id_to_token(tokenizer.eos_id)
    told.setdefault("clean_up_tokenization_spaces", False)
    _paddable(told)
    return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()


def _paddable(told: dict[str, Any]) -> dict[str, Any]:
    # Batches of prompts need both, and what stands at padding has no effect.
    told["pad_token"] = told.get("pad_token") or told["eos_token"]
    told.setdefault("padding_side", "left")
    return told


def _bytes() -> tokenizers.Tokenizer:
    """Byte b is token b, but for byte 0, which no text has."""
    letters = byte_letters()
    vocabulary = {letters[byte]: byte for byte in range(1, 256)} | {BYTES_EOS: 0}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = tokenizers.AddedToken(BYTES_EOS, normalized=False, special=True)
    tokenizer.add_special_tokens([end])
    return tokenizer


def _from_sentencepiece(
    contents: bytes, name: str
) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """The tokenizer, and its special pieces by role."""
    proto = require_package(
        "sentencepiece.sentencepiece_model_pb2", "data.tokenizer", name
    ).ModelProto()
    proto.ParseFromString(contents)
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    kinds = [piece.type for piece in proto.pieces]
    fix = "Export without the tokenizer, or train one of kind bpe or unigram"
    kind = trainer.model_type
    check(kind in _ALGORITHMS, name, kind, "only bpe and unigram models can be rewritten", fix)
    odd = {
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces=False": not normal.escape_whitespaces,
        "unused pieces": Kind.UNUSED in kinds,
        "normalization after decoding": bool(proto.denormalizer_spec.precompiled_charsmap),
    }
    for what, there in odd.items():
        if there:
            fail(name, what, "cannot be expressed in a tokenizer.json", fix)
    pieces = SentencePieceVocab(
        _ALGORITHMS[kind],
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        kinds,
        charsmap=normal.precompiled_charsmap,
        prefix=normal.add_dummy_prefix,
        squeeze=normal.remove_extra_whitespaces,
    )
    numbers = {role: getattr(trainer, f"{role}_id") for role in _SPECIALS}
    names = {
        role: pieces.texts[number] if 0 <= number < len(pieces.texts) else None
        for role, number in numbers.items()
    }
    return tokenizer_of(pieces), names
