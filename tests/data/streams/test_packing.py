"""Held-out split, joining, rows, segments and positions, in memory and from shards."""

import dataclasses
import itertools

import numpy as np
import pytest
from support.sample_texts import words

from mor_jax.config import DataConfig
from mor_jax.data import open_corpus, open_streams
from mor_jax.data.shards.prepare import PrepareConfig, prepare
from mor_jax.data.shards.reader import RECORD_TOKENS, open_shards
from mor_jax.data.sources.documents import open_documents
from mor_jax.data.streams.packing import PackedSequences, evenly_spaced
from mor_jax.data.streams.token_streams import MemoryStream, join
from mor_jax.data.streams.validation_split import is_validation, text_hash, validation_mask


def split_documents(cfg, tokenizer, split):
    """The texts of a split, read back from its stream."""
    [stream] = open_streams(cfg, tokenizer, split)
    bounds = [0, *stream.ends.tolist()]
    return [tokenizer.decode(stream.read(*pair)) for pair in itertools.pairwise(bounds)]


@pytest.fixture
def stream(texts, byte_tokenizer):
    tokens, ends = join(byte_tokenizer.encode_batch(texts), byte_tokenizer)
    return MemoryStream("test", "data.sources[0]", tokens, ends)


def test_every_document_is_on_exactly_one_side(cfg, texts, byte_tokenizer):
    train = split_documents(cfg, byte_tokenizer, "train")
    heldout = split_documents(cfg, byte_tokenizer, "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert 3 <= len(heldout) <= 25
    assert [text for text in texts if text in set(train)] == train


def test_side_depends_on_the_text_alone(tmp_path, texts, cfg, byte_tokenizer):
    (tmp_path / "other").mkdir()
    for i, text in enumerate(reversed([*texts, *texts[:9], words(99)])):
        (tmp_path / "other" / f"{i:03d}.txt").write_text(text)
    moved = dataclasses.replace(cfg, sources=(f"text:{tmp_path}/other/*",))
    before = set(split_documents(cfg, byte_tokenizer, "heldout"))
    after = set(split_documents(moved, byte_tokenizer, "heldout"))
    assert before == after - {words(99)}
    assert not after & set(split_documents(moved, byte_tokenizer, "train"))


def test_share_is_respected():
    hashes = [text_hash(words(i)) for i in range(4000)]
    for share in (0.05, 0.3):
        assert abs(validation_mask(hashes, share, "s", "x").mean() - share) < 0.025
    assert not is_validation(2**63, 0.5) and is_validation(2**63 - 1, 0.5)


@pytest.mark.parametrize("share", [1e-9, 0.5])
def test_small_corpora_keep_a_document_on_each_side(share):
    for first in range(20):
        mask = validation_mask([text_hash(words(first + i)) for i in range(2)], share, "s", "x")
        assert mask.sum() == 1


@pytest.mark.parametrize("contents", [["alone"], ["same", "same", ""], []])
def test_one_document_cannot_be_split(contents):
    hashes = [text_hash(text) for text in contents if text]
    with pytest.raises(ValueError, match=r"data\.sources\[0\]='text:a': has [01] distinct"):
        validation_mask(hashes, 0.1, "data.sources[0]", "text:a")


def test_rows_cover_the_stream_once_and_targets_follow(stream):
    rows = PackedSequences(stream, 16, document_mask=False)
    assert len(rows) == (len(stream) - 1) // 16
    joined = np.concatenate([rows[i]["tokens"] for i in range(len(rows))])
    np.testing.assert_array_equal(joined, stream.tokens[: len(rows) * 16])
    after = np.concatenate([rows[i]["targets"] for i in range(len(rows))])
    np.testing.assert_array_equal(after, stream.tokens[1 : len(rows) * 16 + 1])
    assert rows[0].keys() == {"tokens", "targets"}
    assert rows[0]["tokens"].dtype == rows[0]["targets"].dtype == np.int32


@pytest.mark.parametrize("length", [5, 16, 100])
def test_segments_and_positions_against_a_walk_through_the_tokens(stream, length):
    rows = PackedSequences(stream, length, document_mask=True)
    for i in range(len(rows)):
        row = rows[i]
        segment, position = 1, 0
        for at, token in enumerate(row["tokens"]):
            assert (row["segments"][at], row["positions"][at]) == (segment, position)
            position += 1
            if token == 0:
                segment, position = segment + 1, 0
        assert row["segments"].dtype == row["positions"].dtype == np.int32


def test_spread_is_even_and_without_repetition():
    assert evenly_spaced(10, 3).tolist() == [0, 3, 6]
    assert evenly_spaced(4, 9).tolist() == [0, 1, 2, 3]
    assert len(set(evenly_spaced(997, 400).tolist())) == 400


def test_a_split_shorter_than_a_row(cfg, byte_tokenizer):
    with pytest.raises(ValueError, match=r"data\.sources\[0\]=.*one sequence of seq_len=100000"):
        open_corpus(cfg, byte_tokenizer, "train", 100_000)


@pytest.mark.parametrize("limit", [100, 2200])
def test_too_much_text_for_memory(cfg, texts, byte_tokenizer, monkeypatch, limit):
    """Refused by the size of the files, or while reading."""
    assert 2200 < len("".join(texts)) < open_documents(cfg.sources[0]).size < 4400
    monkeypatch.setattr("mor_jax.data.streams.token_streams.MEMORY_LIMIT", limit)
    with pytest.raises(
        ValueError, match=r"too many to tokenise in memory.*mor prepare-data --source"
    ):
        open_streams(dataclasses.replace(cfg, validation_fraction=0.33), byte_tokenizer, "train")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, byte_tokenizer):
    """Shards and memory streams of the same documents, some longer than a record."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(words(i) * (400 if i % 4 == 0 else 2))
    source = f"text:{folder}/*.txt"
    output = folder / "shards"
    cfg = PrepareConfig(
        sources=(source,), output=output, shard_tokens=3 * RECORD_TOKENS, validation_fraction=0.3
    )
    manifest = prepare(cfg, lambda progress: None)
    assert len(manifest["splits"]["train"]["shards"]) > 2
    memory = DataConfig(sources=(source,), validation_fraction=0.3, document_mask=True)
    return dataclasses.replace(memory, sources=(f"shards:{output}",)), memory


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("length", [7, 512, 6000])
def test_shards_and_memory_give_the_same_rows(shards, byte_tokenizer, split, length):
    on_disk, in_memory = (open_corpus(cfg, byte_tokenizer, split, length) for cfg in shards)
    assert len(on_disk) == len(in_memory) > 0
    for i in range(0, len(in_memory), max(1, len(in_memory) // 50)):
        for name, array in in_memory[i].items():
            np.testing.assert_array_equal(on_disk[i][name], array)


def test_shard_stream_reads_any_range(shards, byte_tokenizer):
    stream = open_shards(shards[0].sources[0], byte_tokenizer)["train"]
    [memory] = open_streams(shards[1], byte_tokenizer, "train")
    assert len(stream) == len(memory)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, len(stream), 40).tolist():
        stop = min(len(stream), start + int(rng.integers(0, 3 * RECORD_TOKENS)))
        np.testing.assert_array_equal(stream.read(start, stop), memory.read(start, stop))
        np.testing.assert_array_equal(stream.cuts(start, stop), memory.cuts(start, stop))


def test_unreadable_corpus_is_an_error_at_opening(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("")
    assert list(open_documents(f"text:{tmp_path}/a.txt").read(0)) == [""]
    with pytest.raises(ValueError, match="has 0 distinct non-empty documents"):
        open_streams(DataConfig(sources=(f"text:{tmp_path}/a.txt",)), byte_tokenizer, "train")
