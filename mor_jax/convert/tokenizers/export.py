"""Exports a run's tokenizer to files for `AutoTokenizer.from_pretrained`, with the same tokens.

Every export has a tokenizer.json and names the class that loads it unchanged: model-specific
classes would rebuild parts of it by their own rules.
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
"""Files that may belong to a tokenizer, in its directory."""

CONFIG = "tokenizer_config.json"
BYTES_EOS = "<|endoftext|>"
"""Name of token 0 of the byte tokenizer, which ends documents and represents no byte of text."""

_SPECIALS = ("bos", "eos", "pad", "unk")
_ALGORITHMS = {1: "unigram", 2: "bpe"}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files for an exported model, by name.

    A tokenizer.json is copied with the files beside it (chat template, generation settings). A
    SentencePiece model is copied and also converted to a tokenizer.json (for a unigram model,
    equally likely segmentations may be resolved differently). The byte tokenizer becomes a
    byte-level vocabulary.

    Raises:
        ValueError: a SentencePiece model that tokenizer.json cannot express.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return files_of(_byte_tokenizer(), _with_padding({"eos_token": BYTES_EOS}))
    own = tokenizer.files()
    beside = files_beside(Path(tokenizer.name).expanduser(), TOKENIZER_FILES)
    if "tokenizer.json" in own:
        files = beside | own
        files[CONFIG] = _tokenizer_config(tokenizer, files)
        return files
    converted, names = _from_sentencepiece(own["tokenizer.model"], tokenizer.name)
    config = {f"{role}_token": text for role, text in names.items()}
    return beside | own | files_of(converted, _with_padding(config))


def special_ids(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the tokenizer defines them.

    files: from `tokenizer_files(tokenizer)`.
    """
    loaded = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    config = json.loads(files[CONFIG])
    ids = {
        role: loaded.token_to_id(_content(config.get(f"{role}_token"))) for role in _SPECIALS[:3]
    }
    ids["eos"] = tokenizer.eos_id
    return {f"{role}_token_id": number for role, number in ids.items() if number is not None}


def _content(token: Any) -> str:
    # A string or a group of settings; no token is the empty string.
    return token["content"] if isinstance(token, Mapping) else token or ""


def _tokenizer_config(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> bytes:
    """tokenizer_config.json with which every release loads tokenizer.json unchanged."""
    config = json.loads(files.get(CONFIG, b"{}"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Releases from 5 write a list under a name for which earlier ones expect a group.
    if isinstance(config.get("extra_special_tokens"), list):
        config.setdefault("additional_special_tokens", config.pop("extra_special_tokens"))
    config.pop("auto_map", None)
    config.pop("backend", None)
    loaded = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    if loaded.token_to_id(_content(config.get("eos_token"))) != tokenizer.eos_id:
        config["eos_token"] = loaded.id_to_token(tokenizer.eos_id)
    config.setdefault("clean_up_tokenization_spaces", False)
    _with_padding(config)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _with_padding(config: dict[str, Any]) -> dict[str, Any]:
    # Batches of prompts need both. The token used for padding has no effect.
    config["pad_token"] = config.get("pad_token") or config["eos_token"]
    config.setdefault("padding_side", "left")
    return config


def _byte_tokenizer() -> tokenizers.Tokenizer:
    """Byte b is token b, except byte 0, which does not occur in text."""
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
    """The tokenizer, and its special tokens by role."""
    proto = require_package(
        "sentencepiece.sentencepiece_model_pb2", "data.tokenizer", name
    ).ModelProto()
    proto.ParseFromString(contents)
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    kinds = [piece.type for piece in proto.pieces]
    fix = "Export without the tokenizer, or train a bpe or unigram one"
    kind = trainer.model_type
    check(kind in _ALGORITHMS, name, kind, "only bpe and unigram models can be converted", fix)
    unsupported = {
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces=False": not normal.escape_whitespaces,
        "unused pieces": Kind.UNUSED in kinds,
        "normalization after decoding": bool(proto.denormalizer_spec.precompiled_charsmap),
    }
    for feature, used in unsupported.items():
        if used:
            fail(name, feature, "cannot be expressed in a tokenizer.json", fix)
    pieces = SentencePieceVocab(
        _ALGORITHMS[kind],
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        kinds,
        charsmap=normal.precompiled_charsmap,
        prefix=normal.add_dummy_prefix,
        squeeze=normal.remove_extra_whitespaces,
    )
    ids = {role: getattr(trainer, f"{role}_id") for role in _SPECIALS}
    names = {
        role: pieces.texts[token] if 0 <= token < len(pieces.texts) else None
        for role, token in ids.items()
    }
    return tokenizer_of(pieces), names
