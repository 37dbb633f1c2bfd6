"""Every kind of tokenizer: round trips, ends of documents, bad names, vocabulary sizes."""

import json

import numpy as np
import pytest
import sentencepiece

from mor_jax.data import check_vocabulary, load_tokenizer
from mor_jax.data.tokenizers.train_bpe import EOS, train_bpe

SAMPLES = ["def f(x):\n\treturn x\n", "naïve café 東京 🙂", "", "a" * 5000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a trained tokenizer.json and, apart, a SentencePiece model."""
    path = tmp_path_factory.mktemp("tokenizers")
    corpus = [f"the number {i} is followed by {i + 1} " * 3 for i in range(200)]
    (path / "tokenizer.json").write_text(train_bpe(corpus, 300))
    (path / "corpus.txt").write_text("\n".join(corpus))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"),
        model_prefix=str(path / "pieces"),
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path


@pytest.mark.parametrize("name", ["bytes", "tokenizer.json", "."])
def test_round_trip(folder, name):
    tokenizer = load_tokenizer(name if name == "bytes" else str(folder / name))
    encoded = tokenizer.encode_batch(SAMPLES)
    assert [tokenizer.decode(ids) for ids in encoded] == SAMPLES
    for text, ids in zip(SAMPLES, encoded, strict=True):
        assert ids.dtype == np.uint16 and ids.ndim == 1
        assert tokenizer.eos_id not in ids
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_sentencepiece_round_trip(folder):
    tokenizer = load_tokenizer(str(folder / "pieces.model"))
    for text in ("the number 7 is", "naïve 東京"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_sentencepiece_in_a_directory_is_found(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "pieces.model").read_bytes())
    assert load_tokenizer(str(tmp_path)) == load_tokenizer(str(folder / "pieces.model"))


@pytest.mark.parametrize("name", ["bytes", "tokenizer.json", "pieces.model"])
def test_numbers_outside_the_vocabulary_are_left_out_of_the_text(folder, name):
    tokenizer = load_tokenizer(name if name == "bytes" else str(folder / name))
    text = tokenizer.decode(np.array([0, 255, 254, 10**6, -1, 65, 3]))
    assert text and text == tokenizer.decode([0, 255, 254, 65, 3])
    if name == "bytes":
        # What is no text becomes a replacement character; 0 ends documents.
        assert text == "\ufffd\ufffdA\x03"
    assert tokenizer.decode([10**6, -1]) == tokenizer.decode([]) == ""


def test_bytes_are_256_and_zero_ends_documents():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, 0)
    assert tokenizer.encode("A\0é").tolist() == [65, 0xC3, 0xA9]
    assert tokenizer.decode([65, 0, 0xC3]) == "A\ufffd"


def test_spelled_out_special_tokens_are_plain_text(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert tokenizer.eos_id not in tokenizer.encode(f"a {EOS} b")


def test_eos_comes_from_the_configuration_beside_the_file(folder, tmp_path):
    contents = json.loads((folder / "tokenizer.json").read_text())
    extra = contents["added_tokens"][0] | {"id": 300, "content": "<stop>"}
    contents["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    before = load_tokenizer(str(tmp_path))
    config = {"eos_token": {"content": "<stop>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    after = load_tokenizer(str(tmp_path))
    assert before.eos_id == before.encode_batch([""])[0].size == 0
    assert (after.eos_id, after.vocab_size) == (300, 301)
    assert before.fingerprint != after.fingerprint


def test_fingerprint_follows_content_not_path(folder, tmp_path):
    (tmp_path / "copy.json").write_bytes((folder / "tokenizer.json").read_bytes())
    copy = load_tokenizer(str(tmp_path / "copy.json"))
    assert copy == load_tokenizer(str(folder)) and copy != load_tokenizer("bytes")
    assert len({copy, load_tokenizer(str(folder))}) == 1


def test_training_is_deterministic_and_needs_room_for_bytes():
    corpus = ["abab abab", "cdcd"] * 20
    assert train_bpe(corpus, 270) == train_bpe(corpus, 270)
    with pytest.raises(ValueError, match=r"--train-bpe=200: must be at least 257"):
        train_bpe(corpus, 200)


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"not json", "not a Hugging Face tokenizer"), (b"\xff\xfe", "not a Hugging Face tokenizer")],
)
def test_broken_tokenizer_json(tmp_path, contents, message):
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(ValueError, match=rf"data\.tokenizer=.*{message}"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_of_document(folder, tmp_path):
    text = (folder / "tokenizer.json").read_text().replace(EOS, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"no end-of-document token.*tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_broken_sentencepiece_model(tmp_path):
    (tmp_path / "x.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer='gpt-9': is neither 'bytes' nor"):
        load_tokenizer("gpt-9")
    with pytest.raises(ValueError, match=r"--tokenizer=.*neither tokenizer\.json nor"):
        load_tokenizer(str(tmp_path), "--tokenizer")


def test_vocabulary_must_fit_the_model(folder):
    tokenizer = load_tokenizer(str(folder))
    check_vocabulary(tokenizer, 300)
    with pytest.raises(ValueError, match=r"model\.vocab_size=256: must be at least 300.*384"):
        check_vocabulary(tokenizer, 256)
