"""Converts SentencePiece vocabularies to a Hugging Face tokenizer.json with the same tokens."""

import dataclasses
import json
import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"


class Kind(IntEnum):
    """Types of pieces, numbered as in SentencePiece files and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class SentencePieceVocab:
    """A SentencePiece vocabulary: pieces in the order of their ids, and the normalisation of text.

    charsmap: compiled normalisation rules, empty for none. prefix: prepend a space to every text.
    squeeze: collapse runs of spaces and strip those at both ends.
    """

    algorithm: Literal["bpe", "unigram"]
    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    charsmap: bytes = b""
    prefix: bool = True
    squeeze: bool = False

    def of(self, *kinds: Kind) -> list[str]:
        """The texts of the pieces of these kinds."""
        return [text for text, kind in zip(self.texts, self.kinds, strict=True) if kind in kinds]


def tokenizer_of(pieces: SentencePieceVocab) -> tokenizers.Tokenizer:
    """A tokenizer with the same pieces and ids; it adds no special tokens to texts."""
    tokenizer = tokenizers.Tokenizer(_model(pieces))
    steps: list[Any] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.squeeze:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if pieces.prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    symbols = sorted(pieces.of(Kind.USER_DEFINED), key=len, reverse=True)
    if symbols:
        whole = "|".join(re.escape(symbol) for symbol in symbols)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(whole), "isolated")
    ends = [decoders.Strip(" ", 1, 0)] if pieces.prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    tokenizer.decoder = decoders.Sequence(steps)
    special = pieces.of(Kind.CONTROL, Kind.UNKNOWN)
    tokenizer.add_special_tokens([_special(text) for text in special])
    return tokenizer


def _special(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, normalized=False, special=True)


def _model(pieces: SentencePieceVocab) -> Any:
    unknown = pieces.of(Kind.UNKNOWN)
    fallback = len(pieces.of(Kind.BYTE)) == 256
    if pieces.algorithm == "unigram":
        # User-defined pieces are never split.
        scores = [
            0.0 if kind == Kind.USER_DEFINED else score
            for score, kind in zip(pieces.scores, pieces.kinds, strict=True)
        ]
        vocabulary = list(zip(pieces.texts, scores, strict=True))
        unknown_id = pieces.texts.index(unknown[0]) if unknown else None
        return models.Unigram(vocabulary, unk_id=unknown_id, byte_fallback=fallback)
    return models.BPE(
        vocab={text: number for number, text in enumerate(pieces.texts)},
        merges=_merges(pieces),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=fallback,
        ignore_merges=Kind.USER_DEFINED in pieces.kinds,
    )


def _merges(pieces: SentencePieceVocab) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece, in the order of its score.

    SentencePiece merges the two neighbours whose concatenation scores best; it has no list of
    merges.
    """
    rows = zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
    normal = {text: score for text, score, kind in rows if kind == Kind.NORMAL}
    merges = [
        (-score, number, cut, text)
        for number, (text, score) in enumerate(normal.items())
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(text[:cut], text[cut:]) for _, _, cut, text in sorted(merges)]


def add_around_text(tokenizer: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Makes the tokenizer add the tokens `first` before and `last` after every text."""
    ends = [text for text in (first, last) if text is not None]
    if not ends:
        return
    special = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(ends)]

    def template(part: str) -> list[str]:
        return [first] * (first is not None) + [part] + [last] * (last is not None)

    byte_level = tokenizer.post_processor
    added = processors.TemplateProcessing(
        single=template("$A"), pair=template("$A") + template("$B"), special_tokens=special
    )
    both = added if byte_level is None else processors.Sequence([byte_level, added])
    tokenizer.post_processor = both


def files_of(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    """Contents of tokenizer.json, and of tokenizer_config.json with `config` and the class name."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in config.items() if value is not None},
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": text.encode(),
    }
