"""The bytes of single tokens: together they are those of the text."""

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor_jax.data import load_tokenizer
from mor_jax.data.tokenizers.train_bpe import train_bpe
from mor_jax.inference.token_bytes import token_bytes

TEXT = "the number 7, naïve 東京 🙂\n\tdone"
CORPUS = [f"the number {i} is done " for i in range(200)]


def metaspace() -> str:
    """A tokenizer that marks words by a space before them and falls back to bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    told = json.loads(made.to_str())
    told["added_tokens"] = told["added_tokens"][:2]
    return json.dumps(told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    (path / "bpe.json").write_text(train_bpe(CORPUS, 300))
    (path / "metaspace.json").write_text(metaspace())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path / "pieces"),
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path


@pytest.mark.parametrize("name", ["bytes", "bpe.json", "metaspace.json", "pieces.model"])
def test_tokens_together_are_the_text(folder, name):
    tokenizer = load_tokenizer(name if name == "bytes" else str(folder / name))
    find = token_bytes(tokenizer)
    ids = tokenizer.encode(TEXT).tolist()
    # Tokenizers that mark words put a space before the first.
    assert b"".join(map(find, ids)).removeprefix(b" ") == TEXT.encode()
    assert find(-1) == find(10**6) == b""


def test_special_tokens_have_their_name(folder):
    tokenizer = load_tokenizer(str(folder / "bpe.json"))
    assert token_bytes(tokenizer)(tokenizer.eos_id) == b"<|endoftext|>"
