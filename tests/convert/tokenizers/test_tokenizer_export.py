"""Tokenizers of exports: `AutoTokenizer`, old and new, gives the tokens that training saw."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from support import old_transformers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from mor_jax.convert.tokenizers.export import special_ids, tokenizer_files
from mor_jax.data.tokenizers.load import load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def squares(n):\n    return [i * i for i in range(n)]\n",
    "In 1969, 650 million people watched; prices rose by 12.5 %.",
    "Größe, façade, naïve; 日本語 и русский; ﬁne ½.",
    "a  b   c\t\td\r\ne    10   200",
] * 20
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "  leading and trailing  ",
    "unseen \u2603 and \U0001f600 e\u0301",
    "0123456789 00 000 0000",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "with <sep> and<sep>without spaces",
    "line\nline\n\n\n  indented 42\n",
]


def sentencepiece_model(path, **options):
    file = io.BytesIO()
    options = {"vocab_size": 330, "hard_vocab_limit": False, "minloglevel": 2} | options
    texts = iter(CORPUS)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, **options)
    path.mkdir()
    (path / "tokenizer.model").write_bytes(file.getvalue())


def hugging_face(path, config, apart):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if apart else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))


def make(kind, path):
    """Makes the tokenizer `kind` in `path` and returns what `data.tokenizer` would be."""
    if kind == "bytes":
        return "bytes"
    if kind == "hf":
        hugging_face(path, None, apart=False)
    elif kind == "hf_class":
        # A class of its own, the list that new releases write, another end of documents.
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "extra_special_tokens": ["<|im_start|>"],
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
            "chat_template": "{{ messages[0]['content'] }}<|im_end|>",
        }
        hugging_face(path, config, apart=True)
        (path / "generation_config.json").write_text('{"temperature": 0.5}')
    elif kind == "spm_bpe":
        sentencepiece_model(
            path,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=600,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    else:
        sentencepiece_model(path, model_type="unigram", user_defined_symbols=["<sep>"])
    return str(path)


KINDS = ("bytes", "hf", "hf_class", "spm_bpe", "spm_unigram")

READ = """
import json, os, sys
from pathlib import Path
os.environ.update(USE_TORCH="0", USE_FLAX="0")
from transformers import AutoTokenizer
texts = json.loads(sys.argv[2])
found = {}
for path in Path(sys.argv[1]).iterdir():
    t = AutoTokenizer.from_pretrained(path)
    ids = [t(text, add_special_tokens=False)["input_ids"] for text in texts]
    found[path.name] = [ids, t.eos_token_id, [t.decode(i, skip_special_tokens=True) for i in ids]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """kind -> (our tokenizer, directory of its export)."""
    made, out = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("exports")
    found = {}
    for kind in KINDS:
        ours = load_tokenizer(make(kind, made / kind))
        (out / kind).mkdir()
        for name, contents in tokenizer_files(ours).items():
            (out / kind / name).write_bytes(contents)
        found[kind] = (ours, out / kind)
    return found


@pytest.fixture(scope="module")
def in_old_release(exported):
    folder = next(iter(exported.values()))[1].parent
    return json.loads(old_transformers.run(READ, str(folder), json.dumps(TEXTS)))


@pytest.mark.parametrize("kind", KINDS)
def test_new_releases_give_our_tokens(kind, exported):
    ours, path = exported[kind]
    theirs = AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        expected = ours.encode(text).tolist()
        got = theirs(text, add_special_tokens=False)["input_ids"]
        assert got == expected, (text, theirs.convert_ids_to_tokens(got))
    assert theirs.eos_token_id == ours.eos_id
    batch = theirs(["a", "a much longer text"], padding=True)["input_ids"]
    assert batch[0][0] == theirs.pad_token_id and batch[0][-1] == ours.encode("a")[-1]
    # A run can start from the export again.
    again = load_tokenizer(str(path))
    assert [again.encode(text).tolist() for text in TEXTS] == [
        ours.encode(text).tolist() for text in TEXTS
    ]
    assert again.eos_id == ours.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_release_gives_our_tokens(kind, exported, in_old_release):
    ours, _ = exported[kind]
    ids, eos, texts = in_old_release[kind]
    assert ids == [ours.encode(text).tolist() for text in TEXTS]
    assert eos == ours.eos_id
    if kind != "spm_unigram":
        # What is unknown there is left out here.
        assert texts == [ours.decode(ours.encode(text)) for text in TEXTS]


def ids_of(tokenizer):
    return special_ids(tokenizer, tokenizer_files(tokenizer))


def test_what_lies_beside_comes_along(exported):
    ours, path = exported["hf_class"]
    assert (path / "generation_config.json").read_text() == '{"temperature": 0.5}'
    told = json.loads((path / "tokenizer_config.json").read_text())
    assert told["chat_template"].endswith("<|im_end|>")
    theirs = AutoTokenizer.from_pretrained(path)
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat == "Hello<|im_end|>"
    assert ids_of(ours) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_special_tokens_of_the_others(exported):
    ends = {"eos_token_id": 0, "pad_token_id": 0}
    assert ids_of(exported["bytes"][0]) == ids_of(exported["hf"][0]) == ends
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert ids_of(exported["spm_bpe"][0]) == ends
    bytes_ = AutoTokenizer.from_pretrained(exported["bytes"][1])
    assert bytes_("\u0100\0x", add_special_tokens=False)["input_ids"] == [0xC4, 0x80, ord("x")]


def test_a_sentencepiece_model_that_cannot_be_rewritten_is_refused(tmp_path):
    sentencepiece_model(tmp_path / "t", model_type="char")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    with pytest.raises(ValueError, match="only bpe and unigram"):
        tokenizer_files(tokenizer)
