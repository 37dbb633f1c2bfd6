"""Tokenizers read from files: Hugging Face `tokenizer.json` and SentencePiece models."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.data.tokenizers.base import Tokenizer

# EOS tokens of published tokenizers, in order of preference.
EOS_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)


def _digest(kind: str, contents: bytes, eos_id: int) -> str:
    return f"{kind}-{hashlib.sha256(contents + f':{eos_id}'.encode()).hexdigest()[:24]}"


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. EOS is the `eos_token` of the `tokenizer_config.json` next to it,
    otherwise the first of `EOS_NAMES` in the vocabulary.

    Special tokens spelled out in a text are encoded as ordinary text, so a document cannot contain
    an EOS.
    """

    def __init__(self, name: str, path: Path, setting: str = "data.tokenizer") -> None:
        tokenizers = require_package("tokenizers", setting, name)
        contents = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(contents.decode("utf-8"))
        # The library raises plain Exception for a malformed file.
        except Exception as error:
            rule = f"{path} is not a Hugging Face tokenizer ({error})"
            fail(setting, name, rule, "Give the path of a tokenizer.json")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        config_file = path.with_name("tokenizer_config.json")
        self._files = {"tokenizer.json": contents}
        eos: Any = None
        if config_file.exists():
            self._files[config_file.name] = config_file.read_bytes()
            eos = json.loads(self._files[config_file.name]).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        matches = [token for token in (eos, *EOS_NAMES) if token in vocabulary]
        rule = f"no end-of-document token: its vocabulary has none of {(eos, *EOS_NAMES)}"
        fix = 'Put {"eos_token": "..."} into tokenizer_config.json next to the file'
        check(bool(matches), setting, name, rule, fix)
        self.name = name
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary[matches[0]]
        self.fingerprint = _digest("hf", contents, self.eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, encoded in parallel."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, self.dtype) for item in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens; special tokens and ids outside the vocabulary are dropped."""
        known = [int(i) for i in np.asarray(ids).reshape(-1) if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` and, if it exists, `tokenizer_config.json`."""
        return self._files


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its `</s>` is the EOS."""

    def __init__(self, name: str, path: Path, setting: str = "data.tokenizer") -> None:
        sentencepiece = require_package("sentencepiece", setting, name)
        contents = path.read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(contents)
        except RuntimeError as error:
            rule = f"{path} is not a SentencePiece model ({error})"
            fail(setting, name, rule, "Give the path of a SentencePiece .model")
        rule = "the model has no end-of-sentence piece, which ends documents"
        fix = "Train it without --eos_id=-1"
        check(self._pieces.eos_id() >= 0, setting, name, rule, fix)
        self._contents = contents
        self.name = name
        self.vocab_size = self._pieces.vocab_size()
        self.eos_id = self._pieces.eos_id()
        self.fingerprint = _digest("spm", contents, self.eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Pieces of each text."""
        return [np.array(ids, self.dtype) for ids in self._pieces.encode(list(texts))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the pieces; control pieces and ids outside the vocabulary are dropped."""
        known = [int(i) for i in np.asarray(ids).reshape(-1) if 0 <= i < self.vocab_size]
        return self._pieces.decode(known)

    def files(self) -> dict[str, bytes]:
        """`tokenizer.model`."""
        return {"tokenizer.model": self._contents}
