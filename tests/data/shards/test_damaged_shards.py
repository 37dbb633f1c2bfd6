"""Shards and preparations whose files were damaged: refused in one line, or written again."""

import functools
import json
import shutil

import pytest
from test_prepare import contents, quiet

from mor_jax.data.shards.prepare import PrepareConfig, prepare
from mor_jax.data.shards.reader import open_shards
from mor_jax.data.streams.packing import PackedSequences


@pytest.fixture
def cfg(tmp_path, jsonl):
    cfg = PrepareConfig(
        sources=(jsonl,), output=tmp_path / "out", shard_tokens=400, validation_fraction=0.2
    )
    prepare(cfg, quiet)
    return cfg


def read_all(cfg, tokenizer):
    for stream in open_shards(f"shards:{cfg.output}", tokenizer).values():
        rows = PackedSequences(stream, 16, document_mask=True)
        for i in range(len(rows)):
            rows[i]


def without(manifest, *keys):
    holder = functools.reduce(lambda at, key: at[key], keys[:-1], manifest)
    del holder[keys[-1]]
    return manifest


def test_damaged_manifests_are_one_line(cfg, byte_tokenizer):
    path = cfg.output / "manifest.json"
    whole = path.read_text()
    shard = ("splits", "train", "shards", 0)
    for damaged, message in (
        ([], "has format None; this version reads 1"),
        (None, "has format None"),
        ({"format": 1}, r"is damaged: .*'tokenizer'"),
        (without(json.loads(whole), "splits"), "is damaged: .*'splits'"),
        (without(json.loads(whole), "splits", "heldout"), "is damaged: .*'heldout'"),
        (without(json.loads(whole), *shard, "tokens"), "is damaged: .*'tokens'"),
        (json.loads(whole) | {"dtype": "object"}, "is damaged: .*'object'"),
        (
            json.loads(whole.replace('"file": "train', '"file": 5, "x": "train')),
            r"is damaged: .*\(5, 5",
        ),
        (json.loads(whole.replace('"tokens": ', '"tokens": -')), r"is damaged: .*\(-"),
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=rf"='shards:.*manifest\.json {message}") as refused:
            read_all(cfg, byte_tokenizer)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", ["documents.npy", "array_record"])
def test_damaged_contents_are_one_line_and_written_again(cfg, byte_tokenizer, ending):
    before = contents(cfg.output)
    path = cfg.output / f"train-00001.{ending}"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"='shards:.* is damaged \(.*rewrites") as refused:
        read_all(cfg, byte_tokenizer)
    assert "\n" not in str(refused.value) and "pickle.load" not in str(refused.value)
    prepare(cfg, quiet)
    assert contents(cfg.output) == before
    read_all(cfg, byte_tokenizer)


@pytest.mark.parametrize("damaged", [b"{", b"[]", b"{}", b"\xff", b'{"start": 5}'])
def test_damaged_notes_of_a_preparation(cfg, damaged):
    before = contents(cfg.output)
    (cfg.output / "parts" / "00001.json").write_bytes(damaged)
    prepare(cfg, quiet)
    assert contents(cfg.output) == before
    (cfg.output / "settings.json").write_bytes(damaged)
    message = "other settings" if damaged.startswith(b"{") and damaged != b"{" else "is damaged"
    with pytest.raises(ValueError, match=f"--output=.*{message}"):
        prepare(cfg, quiet)
    shutil.rmtree(cfg.output)
    prepare(cfg, quiet)
    assert contents(cfg.output) == before
