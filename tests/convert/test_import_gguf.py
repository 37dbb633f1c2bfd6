"""GGUF files: weights in our order, scaling and tokenizers understood or refused by name."""

import dataclasses
import io
import json
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from support.seeded import random_params
from support.tiny import TINY
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays, nested
from mor_jax.config import RopeScaling
from mor_jax.convert.import_gguf import import_gguf
from mor_jax.convert.names import llama_entries
from mor_jax.convert.views import as_tensors
from mor_jax.data.tokenizers.load import load_tokenizer
from mor_jax.models.params import forward, unembed
from mor_jax.types import Batch

PLAIN, UNTIED = TINY["plain"], TINY["plain_untied"]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def squares(n):\n    return [i * i for i in range(n)]\n",
    "In 1969, 650 million people didn't watch; prices rose by 12.5 %.",
    "Größe, façade, naïve; 日本語 и русский; e\u0301",
] * 20
TEXTS = [
    *CORPUS[:4],
    "",
    "  two  spaces 1234  5",
    "tab\tnew\n\nline \r\n",
    "\U0001f600 I'LL",
    "aaaaa",
]


def interleaved(rows, heads):
    """How llama.cpp stores query and key rows: channels i of both halves of a head side by side."""
    first, second = np.split(rows.reshape(heads, -1, rows.shape[-1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def tensors_of(cfg):
    """The weights of `random_params(cfg)` as a GGUF file has them."""
    view = as_tensors(cfg, llama_entries(cfg), from_arrays(dict(flatten(random_params(cfg)))))
    found = {}
    for name in view.specs:
        array = np.array(view.read(name))
        for part, heads in (("q_proj", cfg.num_heads), ("k_proj", cfg.num_kv_heads)):
            array = interleaved(array, heads) if part in name else array
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        found[name] = array
    return found


def write(path, cfg=PLAIN, kind="F32", words=None, tensors=None, **metadata):
    """A GGUF file. kind: quantization of matrices. words: of the tokenizer. metadata: `llama.*`."""
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_uint16("split.count", metadata.pop("parts", 1))
    told = {
        "block_count": cfg.num_layers,
        "context_length": cfg.max_seq_len,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "rope.dimension_count": cfg.head_dim,
        "rope.freq_base": cfg.rope_theta,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
    }
    for key, value in (told | metadata).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[list] = writer.add_array
        add[type(value)](f"llama.{key}", value)
    for key, value in (WORDS if words is None else words).items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
        add[list] = writer.add_array
        add[type(value)](f"tokenizer.{key}", value)
    for name, array in (tensors or tensors_of(cfg)).items():
        wanted = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        # A row must fill whole blocks of a quantization.
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        wanted = wanted if array.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def byte_level(cut):
    """A trained byte-level tokenizer, and its metadata in a GGUF file."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = {"gpt-2": plain, "smollm": pre_tokenizers.Sequence([digits, plain])}
    tokenizer.pre_tokenizer = steps[cut]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    texts = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer, {
        "ggml.model": "gpt2",
        "ggml.pre": cut,
        "ggml.tokens": texts,
        "ggml.token_type": [3] + [1] * (len(texts) - 1),
        "ggml.merges": [" ".join(pair) for pair in merges],
        "ggml.eos_token_id": 0,
        "chat_template": "{{ messages }}",
    }


# A vocabulary that fits the 64 rows of the small model.
WORDS = {
    "ggml.model": "gpt2",
    "ggml.pre": "gpt-2",
    "ggml.tokens": ["<|end|>", *"abcdefgh", "ab", "cd"],
    "ggml.token_type": [3] + [1] * 10,
    "ggml.merges": ["a b", "c d"],
    "ggml.eos_token_id": 0,
}


def assert_close(params, expected, error):
    for path, value in flatten(expected):
        np.testing.assert_allclose(params.read(path), value, atol=error, rtol=0, err_msg=path)


@pytest.mark.parametrize("cfg", [PLAIN, UNTIED], ids=["tied", "untied"])
def test_weights_come_in_bit_for_bit(cfg, tmp_path):
    imported = import_gguf(write(tmp_path / "x.gguf", cfg))
    ours, theirs = imported.cfg, cfg
    for field in (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "max_seq_len",
    ):
        assert getattr(ours, field) == getattr(theirs, field)
    assert (ours.rope_theta, ours.norm_eps) == (theirs.rope_theta, theirs.norm_eps)
    assert ours.tie_embeddings == theirs.tie_embeddings
    assert_close(imported.params, random_params(cfg), 0.0)
    assert not imported.facts["notes"]


@pytest.mark.parametrize(("kind", "error"), [("F16", 3e-4), ("BF16", 2e-3), ("Q8_0", 2e-3)])
def test_narrow_and_quantized_weights_are_what_the_file_holds(kind, error, tmp_path):
    imported = import_gguf(write(tmp_path / "x.gguf", kind=kind))
    assert_close(imported.params, random_params(PLAIN), error)
    assert kind in imported.facts["tensors"]
    assert bool(imported.facts["notes"]) == (kind == "Q8_0")
    raw = gguf.quantize(tensors_of(PLAIN)["token_embd.weight"], gguf.GGMLQuantizationType[kind])
    whole = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(imported.params.read("embed.weight"), whole)


def divisors(factor, length):
    """What llama.cpp divides the frequencies of a Llama 3.1 by."""
    found = []
    for i in range(0, PLAIN.head_dim, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / PLAIN.head_dim)
        if wavelength < length / 4:
            found.append(1.0)
        elif wavelength > length:
            found.append(factor)
        else:
            smooth = (length / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_scaling_of_the_rotary_embedding_is_understood(tmp_path):
    def scaling(factors=None, **metadata):
        tensors = tensors_of(PLAIN)
        if factors is not None:
            tensors["rope_freqs.weight"] = np.array(factors, np.float32)
        metadata = {"rope.freq_base": 500000.0} | metadata
        path = write(tmp_path / "x.gguf", tensors=tensors, **metadata)
        return import_gguf(path).cfg.rope_scaling

    llama3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    assert scaling(divisors(8.0, 8192)) == llama3
    told = {"rope.scaling.original_context_length": 4000}
    assert scaling(divisors(32.0, 4000), **told).original_max_position_embeddings == 4000
    assert scaling([1, 1, 1, 1]) == RopeScaling()
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert scaling(**linear) == RopeScaling(rope_type="linear", factor=4.0)
    assert scaling(**{"rope.scale_linear": 2.0}) == RopeScaling(rope_type="linear", factor=2.0)
    assert scaling(**{"rope.scaling.type": "none", "rope.scaling.factor": 4.0}) == RopeScaling()
    with pytest.raises(ValueError, match=r"rope_freqs\.weight.*not those of Llama 3\.1"):
        scaling([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"architecture": "qwen2"}, "general.architecture='qwen2'"),
        ({"expert_count": 8}, "llama.expert_count=8"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
        ({"attention.head_count_kv": [2, 2, 1, 2]}, "head_count_kv.*differs between layers"),
        ({"feed_forward_length": 96}, "misshapen   model.layers.0.mlp.gate_proj.weight"),
        ({"block_count": 5}, "llama.block_count=5: makes 5 .*, and the tensors make 4"),
        ({"block_count": 2**31 - 1}, "llama.block_count=2147483647: makes .* tensors make 4"),
        ({"block_count": 0}, "llama.block_count=0: must be a number of at least 1"),
        ({"attention.head_count": 0}, "llama.attention.head_count=0: must be a number of at least"),
        ({"attention.head_count": [4, 4, 4, 2]}, "head_count=.*differs between layers"),
        ({"attention.head_count": "four"}, "head_count='four': must be a whole number"),
        ({"rope.freq_base": "many"}, "rope.freq_base='many': must be a number"),
        ({"rope.freq_base": math.nan}, "rope.freq_base=nan: must be a number"),
        ({"rope.freq_base": 0.0}, "rope_theta=0.0: must be greater than 0"),
        ({"rope.scaling.factor": "4"}, "rope.scaling.factor='4': must be a number"),
        ({"attention.scale": "odd"}, "attention.scale='odd': must be a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_models_are_refused_by_name(metadata, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        import_gguf(write(tmp_path / "x.gguf", **metadata))


def test_tensors_that_a_llama_lacks_are_listed(tmp_path):
    more = tensors_of(PLAIN) | {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    with pytest.raises(ValueError, match=r"unexpected  blk\.0\.attn_q\.bias"):
        import_gguf(write(tmp_path / "x.gguf", tensors=more))


def test_numbers_that_are_no_weights_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"token_embd\.weight \(I8\).*cannot be dequantized"):
        import_gguf(str(tmp_path / "x.gguf"))


def test_parts_of_a_split_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one part of several.*--merge"):
        import_gguf(write(tmp_path / "x.gguf", parts=3))


@pytest.mark.parametrize("keep", [0, 3, 20, 700, -1])
def test_cut_files_are_named(keep, tmp_path):
    path = tmp_path / "x.gguf"
    raw = (tmp_path / write(path)).read_bytes()
    path.write_bytes(raw[: len(raw) // 2 if keep < 0 else keep])
    with pytest.raises(ValueError, match=r"x\.gguf.*damaged or not a GGUF file"):
        import_gguf(str(path))


def test_other_files_and_corrupt_heads_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    raw = bytearray((tmp_path / write(path)).read_bytes())
    path.write_bytes(b"PK\3\4" + raw[4:])
    with pytest.raises(ValueError, match="not a GGUF file"):
        import_gguf(str(path))
    # A million tensors, of which there are few.
    raw[8:16] = (10**6).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        import_gguf(str(path))


def test_counts_that_a_file_has_no_room_for(tmp_path):
    path = tmp_path / "x.gguf"
    raw = (tmp_path / write(path)).read_bytes()
    kinds = raw.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for place, told in ((8, "tensors and"), (16, "too short for .* settings"), (kinds, "values")):
        for count in (2**20 * 3, 2**62):
            path.write_bytes(raw[:place] + count.to_bytes(8, "little") + raw[place + 8 :])
            with pytest.raises(ValueError, match=rf"x\.gguf.*damaged or not a GGUF file.*{told}"):
                import_gguf(str(path))
    path.write_bytes(raw[:4] + (3).to_bytes(4, "big") + raw[8:])
    with pytest.raises(ValueError, match=r"big-endian machines.*gguf-convert-endian"):
        import_gguf(str(path))


def test_another_architecture_is_refused_before_its_vocabulary_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "x.gguf", architecture="gemma3")
    monkeypatch.delattr(gguf, "GGUFReader")
    with pytest.raises(ValueError, match=r"general\.architecture='gemma3': only llama"):
        import_gguf(path)


@pytest.mark.parametrize("path", ["", "runs/nowhere.gguf"])
def test_paths_that_are_no_files_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"is a directory|neither an existing path"):
        import_gguf(path or str(tmp_path))


def loaded(imported, folder):
    for name, contents in imported.tokenizer.items():
        (folder / name).write_bytes(contents)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("cut", ["gpt-2", "smollm"])
def test_byte_level_tokenizers_give_the_same_tokens(cut, tmp_path):
    wide = wider(330)
    theirs, words = byte_level(cut)
    imported = import_gguf(write(tmp_path / "x.gguf", wide, words=words))
    ours = loaded(imported, tmp_path)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == expected, text
        assert ours.decode(expected) == theirs.decode(expected)
    assert ours.eos_id == 0
    assert b"{{ messages }}" in imported.tokenizer["tokenizer_config.json"]
    read = tokenizers.Tokenizer.from_str(imported.tokenizer["tokenizer.json"].decode())
    assert read.encode("a<|end|>").ids[-1] == 0


def wider(rows):
    """The small model with another vocabulary."""
    return dataclasses.replace(PLAIN, vocab_size=rows)


def test_llama3_tokenizers_cut_like_llama3_and_begin_texts(tmp_path):
    words = WORDS | {"ggml.pre": "llama-bpe", "ggml.bos_token_id": 1}
    words["ggml.tokens"] = ["<|end|>", "<|begin|>", *"abcdefgh0123", "ab", "00", "000"]
    words["ggml.token_type"] = [3, 3] + [1] * 15
    words["ggml.merges"] = ["a b", "0 0", "00 0"]
    imported = import_gguf(write(tmp_path / "x.gguf", words=words))
    read = tokenizers.Tokenizer.from_str(imported.tokenizer["tokenizer.json"].decode())
    # At most three digits stay together.
    assert read.encode("ab0000", add_special_tokens=False).tokens == ["ab", "000", "0"]
    assert read.encode("ab").tokens == ["<|begin|>", "ab"]
    assert read.encode("ab<|end|>").tokens == ["<|begin|>", "ab", "<|end|>"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_give_the_same_tokens(prefix, tmp_path):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    size = theirs.vocab_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in range(size)
    ]
    words = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [theirs.id_to_piece(i) for i in range(size)],
        "ggml.scores": [theirs.get_score(i) for i in range(size)],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": prefix,
    }
    imported = import_gguf(write(tmp_path / "x.gguf", wider(size), words=words))
    ours = loaded(imported, tmp_path)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.eos_id == 2
    read = tokenizers.Tokenizer.from_str(imported.tokenizer["tokenizer.json"].decode())
    assert read.encode("a").ids[0] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ggml.model": "bert"}, "tokenizer.ggml.model='bert'"),
        ({"ggml.pre": "tekken"}, "tokenizer.ggml.pre='tekken'.*smollm"),
        ({"ggml.pre": "default"}, "tokenizer.ggml.pre='default'"),
        ({"ggml.merges": ["a b", "a c"]}, r"merges=\[\('a', 'c'\)\]"),
        (
            {"ggml.tokens": ["<|end|>", *"aacdefgh", "ab", "cd"]},
            "tokens=1.*cannot be distinguished",
        ),
        ({"ggml.merges": ["a b", "cd ", " a"]}, r"merges=\[\('cd', ''\)"),
        ({"ggml.tokens": [*"abcdefgh", "xab", "cd", "e f"]}, r"merges=\[\('a', 'b'\)\]"),
        ({"ggml.tokens": 3}, "ggml.tokens=3: must be a list, each a string"),
        ({"ggml.tokens": list(range(11))}, "ggml.tokens=.*must be a list, each a string"),
        ({"ggml.eos_token_id": "0"}, "eos_token_id='0': must be a whole number"),
        ({"ggml.token_type": [1, 1]}, "token_type=2"),
        ({"ggml.eos_token_id": 99}, "eos_token_id=99"),
        (
            {"ggml.tokens": [f"t{i}" for i in range(65)], "ggml.token_type": [1] * 65}
            | {"ggml.merges": ["t1 t2"]},
            "merges",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused_by_name(changes, reason, tmp_path):
    path = write(tmp_path / "x.gguf", words=WORDS | changes)
    with pytest.raises(ValueError, match=reason):
        import_gguf(path)
    # The weights can be had without it.
    assert import_gguf(path, tokenizer=False).tokenizer is None


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    more = WORDS | {
        "ggml.tokens": [*WORDS["ggml.tokens"], *(f"x{i}" for i in range(60))],
        "ggml.token_type": [*WORDS["ggml.token_type"], *([1] * 60)],
    }
    with pytest.raises(ValueError, match="has a token 70, but the model embeds 64"):
        import_gguf(write(tmp_path / "x.gguf", words=more))


def test_logits_are_those_of_transformers_reading_the_same_file(tmp_path):
    path = write(tmp_path / "x.gguf", kind="Q8_0", vocab_size=64)
    imported = import_gguf(path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    tokens = jnp.asarray(ids, jnp.int32)
    params = jax.tree.map(jnp.asarray, nested(imported.params))
    hidden = jax.jit(lambda p: forward(imported.cfg, p, Batch(tokens, tokens)).hidden)(params)
    got = unembed(imported.cfg, params, hidden)
    assert np.max(np.abs(got - expected)) < 1e-5 * np.max(np.abs(expected))
