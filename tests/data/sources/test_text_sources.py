"""Which source a name means: patterns, directories, kinds that are not read and what to write."""

import glob
import os

import numpy as np
import pytest

from mor_jax.data import load_tokenizer
from mor_jax.data.shards.reader import open_shards
from mor_jax.data.sources.documents import open_documents
from mor_jax.data.sources.files import matches


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A tree of files, as the working directory."""
    for name in ("a.jsonl", "b/a.jsonl", "b/c/d.jsonl", "b/.x/e.jsonl", ".y.jsonl", "b.c/f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_patterns_of_an_object_store_mean_what_local_ones_do(corpus):
    names = [str(p.relative_to(corpus)) for p in corpus.rglob("*") if p.is_file()]
    parts = ["**", "*", "b", "?", "*.jsonl", ".*", "[ab]*", "b.c", "**.jsonl"]
    random = np.random.default_rng(0)
    fitting = 0
    for _ in range(400):
        pattern = "/".join(parts[i] for i in random.integers(0, len(parts), random.integers(1, 5)))
        found = [name for name in names if matches(name.split("/"), pattern.split("/"))]
        expected = {p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
        assert set(found) == expected, pattern
        fitting += bool(found)
    assert fitting > 50


def test_names_with_brackets_and_home(corpus, monkeypatch):
    (corpus / "part[1].jsonl").write_text('{"text": "brackets"}\n')
    assert list(open_documents("jsonl:part[1].jsonl").read(0)) == ["brackets"]
    monkeypatch.setenv("HOME", str(corpus))
    assert list(open_documents("jsonl:~/a.jsonl").read(0)) == ["t"]


@pytest.mark.parametrize(
    ("names", "given", "advised"),
    [
        (("a.jsonl", "b.jsonl", "readme.md"), "jsonl", "jsonl:here/*.jsonl"),
        (("a.jsonl.zst", "x/b.jsonl.zst", "c.jsonl"), "jsonl", "jsonl:here/**/*.jsonl.zst"),
        (("a.json", "readme.md", "LICENSE"), "jsonl", "jsonl:here/*.json"),
        (("train.parquet", "readme.md"), "jsonl", "parquet:here/*.parquet"),
        (("train.parquet", "a.jsonl"), "parquet", "parquet:here/*.parquet"),
        (("a.txt", "b.md", "c.md"), "text", "text:here/*.txt"),
        (("a.py", "b.py", "c.md"), "text", "text:here/*.py"),
        (("a.jsonl", "readme.md"), "text", "jsonl:here/*.jsonl"),
        (("a.bin", "b.bin"), "jsonl", "jsonl:here/**/*.jsonl"),
        ((), "parquet", "parquet:here/**/*.parquet"),
        (("dataset_dict.json", "train/data.arrow"), "parquet", "hf:here"),
        (("state.json", "data.arrow"), "jsonl", "hf:here"),
        (("features.json", "dataset_info.json"), "text", "tfds:here"),
        (("manifest.json", "train-00000.array_record"), "jsonl", "shards:here"),
    ],
)
def test_a_directory_gets_a_source_that_works(tmp_path, monkeypatch, names, given, advised):
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).touch()
    (tmp_path / "here").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=rf"='{given}:here': is a directory") as refused:
        open_documents(f"{given}:here")
    assert f"'{advised}'" in str(refused.value)
    kind = advised.partition(":")[0]
    if kind in ("jsonl", "text", "parquet") and "none of" not in str(refused.value) and names:
        assert open_documents(advised).spec == advised


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("csv:x.csv", "the kinds are stdlib, text:GLOB.*Tables are read as parquet.*to_parquet"),
        ("x.csv", "Tables are read as parquet"),
        ("json:x.json", r"Did you mean 'jsonl:x\.json'"),
        ("JSONL:X", "Did you mean 'jsonl:X'"),
        ("txt:x", "Did you mean 'text:x'"),
        ("jsnl:x.gz", r"Did you mean 'jsonl:x\.gz'"),
        ("a.jsonl.zst", r"Did you mean 'jsonl:a\.jsonl\.zst'"),
        ("data/x.parquet", r"Did you mean 'parquet:data/x\.parquet'"),
        ("a.txt", r"Did you mean 'text:a\.txt'"),
        ("stdlb", "Did you mean 'stdlib'"),
        ("jsonl", "names no file. Write it as 'jsonl:GLOB'"),
        ("parquet:", "names no file. Write it as 'parquet:GLOB'"),
        ("gs://bucket/x.parquet", r"try 'parquet:gs://bucket/x\.parquet'"),
        ("https://example.com/x.jsonl", "Copy the files to this machine"),
        ("s3://bucket/x.jsonl", "Copy the files to this machine or to gs://"),
        ("webdataset:x.tar", "unknown source; the kinds are"),
        ("jsonl:https://example.com/x.jsonl", "is neither a path nor an address"),
        ("jsonl:file:///x.jsonl", "write paths without 'file://'"),
        ("text:*.{txt,md}", "matches no file.*one source per alternative"),
        ("text:gs://bucket", "must name a bucket and a file"),
        ("text:gs://b*/x", "must name a bucket and a file"),
    ],
)
def test_other_kinds_name_what_to_write(spec, message):
    with pytest.raises(ValueError, match=rf"data\.sources='{spec.split('*')[0]}.*{message}"):
        open_documents(spec)


def test_shards_are_read_here():
    with pytest.raises(ValueError, match=r"'shards:gs://b/x': is read by index.*Copy it"):
        open_shards("shards:gs://b/x", load_tokenizer("bytes"))
