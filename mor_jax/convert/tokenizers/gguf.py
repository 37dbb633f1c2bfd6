"""Converts the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json.

The file contains the vocabulary and the name of its pre-tokenizer. Only pre-tokenizers that can be
rebuilt exactly are supported.
"""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mor_jax.config.parsing import check, fail
from mor_jax.convert.sources.gguf_file import Metadata
from mor_jax.convert.tokenizers.sentencepiece import (
    Kind,
    SentencePieceVocab,
    add_around_text,
    files_of,
    tokenizer_of,
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> pre-tokenizer: GPT-2's, GPT-2's with single digits, or Llama 3's.
PRE_TOKENIZERS = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
}
_FIX = "Pass the tokenizer's Hugging Face files with --tokenizer=DIR"
_SPECIALS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(fields: Metadata) -> dict[str, bytes]:
    """Files of the tokenizer, by name.

    Raises:
        ValueError: the file has no tokenizer, or one that cannot be rebuilt exactly.
    """
    key = "tokenizer.ggml.model"
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = fields.get(key, str)
    rule = f"must be one of {sorted(builders)}"
    check(kind in builders, f"{fields.where}: {key}", kind, rule, _FIX)
    fields.check_present("tokenizer.ggml.tokens")
    texts = fields.get_list("tokenizer.ggml.tokens", str)
    repeated = len(texts) - len(set(texts))
    rule = "tokens with equal text cannot be distinguished"
    check(not repeated, f"{fields.where}: tokenizer.ggml.tokens", repeated, rule, _FIX)
    kinds = fields.get_list("tokenizer.ggml.token_type", int) or [Kind.NORMAL] * len(texts)
    rule = f"must have one entry per token ({len(texts)})"
    ok = len(kinds) == len(texts)
    check(ok, f"{fields.where}: tokenizer.ggml.token_type", len(kinds), rule, "Copy it again")
    tokenizer = builders[kind](fields, texts, kinds)
    names = {name: _text(fields, texts, key) for name, key in _SPECIALS.items()}
    adds_bos = kind == "llama" or _pre_tokenizer(fields) == "llama3"
    first = fields.get("tokenizer.ggml.add_bos_token", bool, adds_bos)
    last = fields.get("tokenizer.ggml.add_eos_token", bool, False)
    add_around_text(
        tokenizer, names["bos_token"] if first else None, names["eos_token"] if last else None
    )
    length = fields.get("llama.context_length", int)
    more = {"chat_template": _chat(fields), "model_max_length": length}
    return files_of(tokenizer, {**names, **more})


def _pre_tokenizer(fields: Metadata) -> str | None:
    return PRE_TOKENIZERS.get(fields.get("tokenizer.ggml.pre", str))


def _text(fields: Metadata, texts: Sequence[str], key: str) -> str | None:
    key = f"tokenizer.ggml.{key}"
    token = fields.get(key, int)
    if token is None:
        return None
    ok = 0 <= token < len(texts)
    rule = f"must be a token, 0 to {len(texts) - 1}"
    check(ok, f"{fields.where}: {key}", token, rule, "Copy it again")
    return texts[token]


def _chat(fields: Metadata) -> Any:
    """The chat template, or a list of several with their names."""
    template = fields.get("tokenizer.chat_template", str)
    named = fields.get_list("tokenizer.chat_templates", str)
    if not named:
        return template
    templates = [("default", template)] if template else []
    for name in named:
        fields.check_present(f"tokenizer.chat_template.{name}")
        templates.append((name, fields.get(f"tokenizer.chat_template.{name}", str)))
    return [{"name": name, "template": text} for name, text in templates]


def _byte_level(
    fields: Metadata, texts: Sequence[str], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    name, pre_tokenizer = fields.get("tokenizer.ggml.pre", str), _pre_tokenizer(fields)
    rule = f"unknown pre-tokenizer; supported are {sorted(PRE_TOKENIZERS)}"
    check(pre_tokenizer is not None, f"{fields.where}: tokenizer.ggml.pre", name, rule, _FIX)
    fields.check_present("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ")) for merge in fields.get_list("tokenizer.ggml.merges", str)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    valid = (len(m) == 2 and {*m, "".join(m)} <= vocabulary.keys() for m in merges)
    invalid = [m for m, ok in zip(merges, valid, strict=True) if not ok]
    rule = "must be pairs of tokens whose concatenation is a token"
    check(not invalid, f"{fields.where}: tokenizer.ggml.merges", invalid[:5], rule, _FIX)
    model = models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre_tokenizer == "llama3")
    tokenizer = tokenizers.Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=pre_tokenizer != "llama3"
    )
    steps: dict[str, list[Any]] = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps[pre_tokenizer], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    pairs = list(zip(texts, kinds, strict=True))
    tokenizer.add_special_tokens(_added(pairs, Kind.CONTROL, True))
    tokenizer.add_tokens(_added(pairs, Kind.USER_DEFINED, False))
    return tokenizer


def _added(
    pairs: Sequence[tuple[str, int]], selected: Kind, special: bool
) -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken(text, normalized=False, special=special)
        for text, kind in pairs
        if kind == selected
    ]


def _sentencepiece(
    fields: Metadata, texts: Sequence[str], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    fields.check_present("tokenizer.ggml.scores")
    scores = fields.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(texts):
        where = f"{fields.where}: tokenizer.ggml.scores"
        rule = f"must have one entry per token ({len(texts)})"
        fail(where, len(scores), rule, "Copy it again")
    return tokenizer_of(
        SentencePieceVocab(
            "bpe",
            texts,
            scores,
            kinds,
            prefix=fields.get("tokenizer.ggml.add_space_prefix", bool, True),
            squeeze=fields.get("tokenizer.ggml.remove_extra_whitespaces", bool, False),
        )
    )
