"""Text as it streams: the pieces are the decoded text, whole characters, cut at the first stop."""

import json
import random

import pytest
import sentencepiece

from mor_jax.data import load_tokenizer
from mor_jax.data.tokenizers.train_bpe import train_bpe
from mor_jax.inference.detokenizer import TextStream, text_before, token_text
from mor_jax.inference.token_bytes import token_bytes

TEXTS = [
    "def f(x):\n\treturn  x\n",
    "naïve café 東京 🙂🙂🙂 the end",
    " the number 7",
    "\n\n\n" * 30 + "1" + " " * 70 + "the",
    "日本語テキスト" * 12,
]


def llama_json(corpus: list[str]) -> str:
    """A tokenizer that marks words by a space before them and falls back to bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=320, special_tokens=special))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    told = json.loads(made.to_str())
    told["added_tokens"] = told["added_tokens"][:3]
    return json.dumps(told)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    corpus = [f"the number {i} is followed by {i + 1} " * 3 for i in range(200)]
    (path / "bpe.json").write_text(train_bpe(corpus, 300))
    (path / "llama.json").write_text(llama_json(corpus))
    (path / "corpus.txt").write_text("\n".join(corpus))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"),
        model_prefix=str(path / "pieces"),
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    names = ("bytes", "bpe.json", "llama.json", "pieces.model")
    return {n: load_tokenizer(n if n == "bytes" else str(path / n)) for n in names}


KINDS = ("bytes", "bpe.json", "llama.json", "pieces.model")


def ids_of(tokenizer, text):
    return [int(token) for token in tokenizer.encode(text)]


def streamed(tokenizer, ids, **options):
    """All the text, and the pieces."""
    stream = TextStream(tokenizer, **options)
    pieces = [stream.push(token)[0] for token in ids]
    pieces.append(stream.finish())
    return "".join(pieces), pieces


@pytest.mark.parametrize("name", KINDS)
def test_the_pieces_are_the_text_and_characters_are_whole(tokenizers, name):
    tokenizer = tokenizers[name]
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        whole, pieces = streamed(tokenizer, ids)
        assert whole == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
        # Nothing waits longer than its character does.
        assert max(map(len, pieces[-4:])) < 20 and len(pieces[-1]) == 0


@pytest.mark.parametrize("name", KINDS)
def test_any_tokens_at_all_become_their_text(tokenizers, name):
    tokenizer, rng, compared = tokenizers[name], random.Random(0), 0
    for number in range(150):
        few = range(tokenizer.vocab_size) if number % 2 else [0, 1, 2, rng.randrange(290), 13, 35]
        ids = rng.choices(few, k=rng.randrange(60))
        if number % 3 == 0:
            ids += ids_of(tokenizer, rng.choice(TEXTS))
        wanted = tokenizer.decode(ids)
        found, _ = streamed(tokenizer, [*ids, tokenizer.vocab_size + 5])
        # Where bytes fall back, a broken character spoils its neighbours in `decode`.
        if name != "llama.json" or "\ufffd" not in wanted:
            assert found == wanted, ids
            compared += bool(wanted)
    assert compared > 20


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_goes_on_where_its_prompt_ends(tokenizers, name):
    tokenizer = tokenizers[name]
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        for cut in range(1, len(ids), 5):
            # A character that the prompt only begins belongs to the answer.
            befores = [tokenizer.decode(ids[: max(cut - missing, 0)]) for missing in range(4)]
            before = next(before for before in befores if not before.endswith("\ufffd"))
            found, _ = streamed(tokenizer, ids[cut:], prompt=ids[:cut])
            assert before + found == tokenizer.decode(ids)


def test_bytes_that_are_no_character_spoil_nothing_before_them(tokenizers):
    tokenizer = tokenizers["llama.json"]
    newline, start = 3 + 10, 3 + 0xE2
    assert tokenizer.decode([newline, start]) == "\ufffd\ufffd"
    found, pieces = streamed(tokenizer, [newline, start, *ids_of(tokenizer, "the")])
    assert found == "\n\ufffd the" and pieces[0] == "\n"
    broken = [3 + 0xFF] * 50
    stream = TextStream(tokenizer)
    shown = "".join(stream.push(token)[0] for token in broken)
    assert shown == "\ufffd" * 47 and stream.finish() == "\ufffd" * 3


@pytest.mark.parametrize("name", KINDS)
def test_each_token_knows_where_its_text_begins(tokenizers, name):
    tokenizer, find = tokenizers[name], token_bytes(tokenizers[name])
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        whole = tokenizer.decode(ids)
        plain, held = TextStream(tokenizer), TextStream(tokenizer, stop=(f"{whole}!", "the!"))
        missing = len(b"".join(map(find, ids))) - len(whole.encode())
        for count, token in enumerate(ids):
            # Tokenizers that mark words drop the space of the first.
            before = b"".join(map(find, ids[:count]))[missing:].decode("utf-8", "ignore")
            plain.push(token)
            held.push(token)
            assert plain.offset == held.offset == len(before)
    # No characters: each byte stands for itself.
    stream, found = TextStream(tokenizers["bytes"], prompt=[0x61, 0xE6]), []
    for token in (0x37, 0xAC, 0xAC, 0x49, 0xE6, 0x9D, 0xB1, 0x62, 0xE6, 0x9D, 0x62):
        stream.push(token)
        found.append(stream.offset)
    assert found == [1, 2, 3, 4, 5, 5, 5, 6, 7, 7, 8]


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_and_its_answer_are_one_text(tokenizers, name):
    tokenizer = tokenizers[name]
    for text in (*TEXTS, "a\ufffd"):
        ids = ids_of(tokenizer, text)
        for cut in range(1, len(ids), 3):
            found, _ = streamed(tokenizer, ids[cut:], prompt=ids[:cut])
            assert text_before(tokenizer, ids[:cut]) + found == tokenizer.decode(ids)


@pytest.mark.parametrize("name", KINDS)
def test_a_token_costs_the_same_after_many(tokenizers, name):
    """In tokens that are decoded, of which its time consists."""
    tokenizer = tokenizers[name]
    for text in ("the number 7 is followed by ", "1\n\n\n    ", "日本"):
        stream = TextStream(tokenizer, stop=("never",))
        decode, spent = stream._decode, []

        def counted(ids, decode=decode, spent=spent):
            spent[-1] += len(ids)
            return decode(ids)

        stream._decode = counted
        for token in ids_of(tokenizer, text) * 400:
            spent.append(0)
            stream.push(token)
        part = len(spent) // 8
        early, late = spent[part : 2 * part], spent[-part:]
        assert max(late) == max(early) and sum(late) < 1.1 * sum(early)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(tokenizers):
    tokenizer = tokenizers["bytes"]
    text = "one two three. END of it"
    ids = ids_of(tokenizer, text)
    for stops, wanted in (
        (("END",), "one two three. "),
        (("END", "three"), "one two "),
        (("two three", "wo"), "one t"),
        (("three", "two three"), "one "),  # Both end there: the longer one.
        (("o", "one"), ""),
        (("of item", "nowhere"), text),
        (("it",), "one two three. END of "),
    ):
        found, _ = streamed(tokenizer, ids, stop=stops)
        assert found == wanted, stops


def test_what_may_begin_a_stop_text_is_held_back(tokenizers):
    stream = TextStream(tokenizers["bytes"], stop=("aab",))
    told = [stream.push(ord(char)) for char in "xaaacaab!"]
    pieces = ["x", "", "", "a", "aac", "", "", "", ""]
    assert told == [(piece, i > 6) for i, piece in enumerate(pieces)]
    assert stream.finish() == ""
    stream = TextStream(tokenizers["bytes"], stop=("aab",))
    assert "".join(stream.push(ord(char))[0] for char in "xaa") == "x"
    assert stream.finish() == "aa"
    # The last character is not whole, so the end is all that completes the stop text.
    stream = TextStream(tokenizers["bytes"], stop=("\ufffd",))
    assert [stream.push(token)[0] for token in (0x61, 0xE2)] == ["a", ""]
    assert stream.finish() == ""


@pytest.mark.parametrize("name", KINDS)
def test_the_text_of_one_token_keeps_its_space(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, "the number is the number")
    assert (
        "".join(token_text(tokenizer, token) for token in ids).strip() == "the number is the number"
    )
