"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json.

The file holds the vocabulary and names the rule by which texts are cut before tokens are looked up.
Only rules that are known exactly are rebuilt.
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
    around,
    files_of,
    tokenizer_of,
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how text is cut: GPT-2's way, so with digits apart, or Llama 3's.
CUTS = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
}
_OTHER = "Give the tokenizer's Hugging Face files with --tokenizer=DIR"
_SPECIALS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(fields: Metadata) -> dict[str, bytes]:
    """Files of the tokenizer, by name.

    Raises:
        ValueError: the file holds none, or one that cannot be rebuilt exactly.
    """
    key = "tokenizer.ggml.model"
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = fields.get(key, str)
    rule = f"only {sorted(builders)} are rebuilt"
    check(kind in builders, f"{fields.where}: {key}", kind, rule, _OTHER)
    fields.check_present("tokenizer.ggml.tokens")
    texts = fields.get_list("tokenizer.ggml.tokens", str)
    twice = len(texts) - len(set(texts))
    rule = "tokens of the same text cannot be told apart"
    check(not twice, f"{fields.where}: tokenizer.ggml.tokens", twice, rule, _OTHER)
    kinds = fields.get_list("tokenizer.ggml.token_type", int) or [Kind.NORMAL] * len(texts)
    rule = "must be as many as there are tokens"
    ok = len(kinds) == len(texts)
    check(ok, f"{fields.where}: tokenizer.ggml.token_type", len(kinds), rule, "Copy it again")
    tokenizer = builders[kind](fields, texts, kinds)
    names = {name: _text(fields, texts, key) for name, key in _SPECIALS.items()}
    always = kind == "llama" or _cut(fields) == "llama3"
    first = fields.get("tokenizer.ggml.add_bos_token", bool, always)
    last = fields.get("tokenizer.ggml.add_eos_token", bool, False)
    around(tokenizer, names["bos_token"] if first else None, names["eos_token"] if last else None)
    length = fields.get("llama.context_length", int)
    more = {"chat_template": _chat(fields), "model_max_length": length}
    return files_of(tokenizer, {**names, **more})


def _cut(fields: Metadata) -> str | None:
    return CUTS.get(fields.get("tokenizer.ggml.pre", str))


def _text(fields: Metadata, texts: Sequence[str], key: str) -> str | None:
    key = f"tokenizer.ggml.{key}"
    number = fields.get(key, int)
    if number is None:
        return None
    ok = 0 <= number < len(texts)
    check(ok, f"{fields.where}: {key}", number, f"there are {len(texts)} tokens", "Copy it again")
    return texts[number]


def _chat(fields: Metadata) -> Any:
    """One template, or several by name."""
    template = fields.get("tokenizer.chat_template", str)
    named = fields.get_list("tokenizer.chat_templates", str)
    if not named:
        return template
    rows = [("default", template)] if template else []
    for name in named:
        fields.check_present(f"tokenizer.chat_template.{name}")
        rows.append((name, fields.get(f"tokenizer.chat_template.{name}", str)))
    return [{"name": name, "template": text} for name, text in rows]


def _byte_level(
    fields: Metadata, texts: Sequence[str], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    pre, cut = fields.get("tokenizer.ggml.pre", str), _cut(fields)
    rule = f"of the rules to cut text, {sorted(CUTS)} are known exactly"
    check(cut is not None, f"{fields.where}: tokenizer.ggml.pre", pre, rule, _OTHER)
    fields.check_present("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ")) for merge in fields.get_list("tokenizer.ggml.merges", str)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    known = (len(m) == 2 and {*m, "".join(m)} <= vocabulary.keys() for m in merges)
    odd = [m for m, ok in zip(merges, known, strict=True) if not ok]
    rule = "must be pairs of tokens whose join is a token"
    check(not odd, f"{fields.where}: tokenizer.ggml.merges", odd[:5], rule, _OTHER)
    model = models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=cut == "llama3")
    tokenizer = tokenizers.Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut != "llama3")
    before: dict[str, list[Any]] = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before[cut], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    pairs = list(zip(texts, kinds, strict=True))
    tokenizer.add_special_tokens(_added(pairs, Kind.CONTROL, True))
    tokenizer.add_tokens(_added(pairs, Kind.USER_DEFINED, False))
    return tokenizer


def _added(
    pairs: Sequence[tuple[str, int]], wanted: Kind, special: bool
) -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken(text, normalized=False, special=special)
        for text, kind in pairs
        if kind == wanted
    ]


def _sentencepiece(
    fields: Metadata, texts: Sequence[str], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    fields.check_present("tokenizer.ggml.scores")
    scores = fields.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(texts):
        where = f"{fields.where}: tokenizer.ggml.scores"
        fail(where, len(scores), "must be as many as there are tokens", "Copy it again")
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
