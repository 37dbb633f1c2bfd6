"""launch/prepare_data.py: what it writes, that it resumes where it stopped, what it refuses."""

import dataclasses
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.sample_texts import words

from mor_jax.cli import prepare_data
from mor_jax.config import DataConfig
from mor_jax.data import load_tokenizer, open_streams
from mor_jax.data.shards.prepare import PrepareConfig, prepare

ROOT = Path(__file__).parents[3]


def quiet(progress):
    pass


def contents(folder):
    """Every file below a folder, as bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def wanted(tmp_path, jsonl):
    """Settings that give several shards of few documents."""
    return PrepareConfig(
        sources=(jsonl,), output=tmp_path / "out", shard_tokens=400, validation_fraction=0.2
    )


def test_shards_hold_every_document_once(wanted, texts, byte_tokenizer):
    manifest = prepare(wanted, quiet)
    sizes = [shard["tokens"] for shard in manifest["splits"]["train"]["shards"]]
    assert len(sizes) > 3 and all(400 <= size < 500 for size in sizes[:-1])
    found = []
    cfg = DataConfig(sources=(f"shards:{wanted.output}",))
    for split in ("train", "heldout"):
        [stream] = open_streams(cfg, byte_tokenizer, split)
        counted = manifest["splits"][split]
        raw = stream.read(0, len(stream))
        assert raw.dtype == np.uint16 and len(raw) == counted["tokens"]
        parts = bytes(raw.astype(np.uint8)).decode().split("\0")
        assert len(parts) - 1 == counted["documents"] and parts[-1] == ""
        found += parts[:-1]
    assert sorted(found) == sorted(texts)


def test_several_sources_follow_each_other(wanted, texts, tmp_path, byte_tokenizer):
    (tmp_path / "extra.txt").write_text(words(500))
    both = dataclasses.replace(wanted, sources=(*wanted.sources, f"text:{tmp_path}/extra.txt"))
    manifest = prepare(both, quiet)
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(texts) + 1


class StoppedError(Exception):
    pass


def stop_after(documents, monkeypatch):
    """A report that raises once so many documents have been written."""
    monkeypatch.setattr("mor_jax.data.shards.prepare_parts.REPORT_SECONDS", -1.0)

    def report(progress):
        if progress.documents >= documents:
            raise StoppedError

    return report


@pytest.mark.parametrize("documents", [1, 9, 25, 26, 59])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(wanted, documents, monkeypatch):
    whole = dataclasses.replace(wanted, output=wanted.output.with_name("whole"))
    prepare(whole, quiet)
    with pytest.raises(StoppedError):
        prepare(wanted, stop_after(documents, monkeypatch))
    assert not (wanted.output / "manifest.json").exists()
    assert not list(wanted.output.rglob("*.partial"))
    parts = wanted.output / "parts"
    # What failed before its first shard has left nothing.
    complete = len(list(parts.iterdir())) if parts.exists() else 0
    kept = []
    prepare(wanted, lambda progress: kept.append(progress.kept))
    assert kept[-1] == complete
    assert (complete == 0) == (documents < 20)
    assert contents(wanted.output) == contents(whole.output)


def test_complete_shards_are_kept_not_written_again(wanted, monkeypatch):
    with pytest.raises(StoppedError):
        prepare(wanted, stop_after(30, monkeypatch))
    before = {path: path.stat().st_mtime_ns for path in wanted.output.glob("train-*")}
    assert before
    prepare(wanted, quiet)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_killed_without_warning(wanted, tmp_path):
    """SIGKILL inside a shard leaves partial files and no manifest; running again heals."""
    program = f"""
import os, pathlib, signal
from mor_jax.data.shards import prepare, prepare_parts
prepare_parts.REPORT_SECONDS = -1.0
def report(done):
    if done.documents == 33:
        os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare(prepare.PrepareConfig(
    sources={wanted.sources!r}, output=pathlib.Path({str(wanted.output)!r}),
    shard_tokens=400, validation_fraction=0.2), report)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert list(wanted.output.glob("*.partial")) and not (wanted.output / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"has no manifest\.json.*resumes where it stopped"):
        open_streams(
            DataConfig(sources=(f"shards:{wanted.output}",)), load_tokenizer("bytes"), "train"
        )
    whole = dataclasses.replace(wanted, output=tmp_path / "whole")
    prepare(whole, quiet)
    prepare(wanted, quiet)
    assert contents(wanted.output) == contents(whole.output)


def test_a_damaged_shard_is_written_again_alone(wanted):
    prepare(wanted, quiet)
    before = contents(wanted.output)
    damaged = wanted.output / "train-00001.array_record"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    others = {p: p.stat().st_mtime_ns for p in wanted.output.glob("train-*") if p != damaged}
    prepare(wanted, quiet)
    assert contents(wanted.output) == before
    for path, time in others.items():
        assert path.stat().st_mtime_ns == time or path.name.startswith("train-00001")


def test_training_a_tokenizer(wanted, texts):
    cfg = dataclasses.replace(wanted, train_bpe=300)
    manifest = prepare(cfg, quiet)
    tokenizer = load_tokenizer(str(cfg.output))
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert 257 < tokenizer.vocab_size <= 300
    [stream] = open_streams(DataConfig(sources=(f"shards:{cfg.output}",)), tokenizer, "train")
    text = tokenizer.decode(stream.read(0, len(stream)))
    assert text.startswith("document") and all(part in "".join(texts) for part in text.split("\n"))
    before = contents(cfg.output)
    prepare(cfg, quiet)
    assert contents(cfg.output) == before


def test_other_settings_are_refused(wanted, tmp_path, jsonl):
    prepare(wanted, quiet)
    before = contents(wanted.output)
    with pytest.raises(ValueError, match=r"--output=.*other settings.*'shard_tokens': \(400, 500"):
        prepare(dataclasses.replace(wanted, shard_tokens=500), quiet)
    with pytest.raises(ValueError, match=r"other settings.*'tokenizer'"):
        prepare(dataclasses.replace(wanted, train_bpe=300), quiet)
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"other settings.*'identities'"):
        prepare(wanted, quiet)
    assert contents(wanted.output) == before


def test_a_source_that_is_mended_needs_no_new_directory(wanted, tmp_path, jsonl):
    """Nothing was written before the bad line, so nothing stands in the way of the next try."""
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1': is not one JSON value"):
        prepare(wanted, quiet)
    (tmp_path / "a.jsonl").write_text('{"text": "mended"}\n' * 3)
    assert prepare(wanted, quiet)["splits"]["train"]["tokens"] > 400


def test_errors_name_flags(wanted):
    with pytest.raises(ValueError, match=r"^--text-key='body': .*a\.jsonl:1 has no such field"):
        prepare(dataclasses.replace(wanted, text_key="body"), quiet)


def test_a_directory_of_something_else_is_refused(wanted):
    wanted.output.mkdir()
    (wanted.output / "thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match="neither empty nor a directory of this command"):
        prepare(wanted, quiet)
    assert contents(wanted.output) == {"thesis.doc": b"precious"}
    # Half a download of somebody's, deep inside, is no leaving of ours.
    (wanted.output / "films").mkdir()
    (wanted.output / "films" / "long.partial").write_text("precious")
    with pytest.raises(ValueError, match="neither empty nor a directory of this command"):
        prepare(wanted, quiet)
    assert contents(wanted.output)["films/long.partial"] == b"precious"


def test_a_start_that_was_killed_at_once_leaves_the_directory_free(wanted):
    wanted.output.mkdir()
    (wanted.output / "settings.json.partial").write_text("{")
    prepare(wanted, quiet)
    assert not list(wanted.output.rglob("*.partial"))


def test_two_at_once_are_refused(wanted):
    wanted.output.mkdir()
    lock = os.open(wanted.output, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another preparation is writing to it"):
        prepare(wanted, quiet)
    os.close(lock)


def test_full_disk(wanted):
    """A limit on file sizes stands in for the disk: the operating system refuses the write."""
    whole = dataclasses.replace(wanted, output=wanted.output.with_name("whole"))
    prepare(whole, quiet)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"train-00000.*cannot be written.*same command again"):
            prepare(wanted, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(wanted.output.rglob("*.partial"))
    assert not list(wanted.output.glob("*.array_record"))
    prepare(wanted, quiet)
    assert contents(wanted.output) == contents(whole.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "--source"),
        ({"sources": ("shards:x",)}, "already tokenised"),
        ({"shard_tokens": 0}, "--shard-tokens=0"),
        ({"validation_fraction": 0.7}, r"--validation-fraction=0\.7: must be in \(0, 0\.5\]"),
        (
            {"validation_fraction": 1e-9},
            r"--validation-fraction=1e-09: gives 60 training.*share above 0\.0",
        ),
        ({"tokenizer": "gpt-9"}, "--tokenizer='gpt-9'"),
        ({"train_bpe": 10}, "--train-bpe=10"),
        ({"train_bpe": 0}, "--train-bpe=0: must be at least 257"),
        ({"train_bpe": 9999999999}, "--train-bpe=9999999999: must be at most 4,194,304"),
        (
            {"output": Path("/tmp") / ("x" * 300)},
            "--output='/tmp/xx.*cannot be used .File name",
        ),
        ({"output": Path("/proc/nowhere")}, "--output='/proc/nowhere': cannot be created"),
    ],
)
def test_bad_settings(wanted, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(wanted, **change), quiet)
    assert not (wanted.output / "manifest.json").exists()


def test_a_preparation_that_failed_at_once_leaves_nothing(wanted, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "abc"\n')
    bad = dataclasses.replace(wanted, sources=(f"jsonl:{tmp_path}/bad.jsonl",))
    with pytest.raises(ValueError, match=r"bad\.jsonl:1.*',' delimiter at column 15\)"):
        prepare(bad, quiet)
    assert not wanted.output.exists()


def test_a_single_document_is_refused(wanted, tmp_path):
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match=r"--source=.*has 1 non-empty documents"):
        prepare(dataclasses.replace(wanted, sources=(f"text:{tmp_path}/one.txt",)), quiet)


@pytest.fixture
def prepared(wanted):
    prepare(wanted, quiet)
    return wanted.output


def open_at(path, tokenizer):
    return open_streams(DataConfig(sources=(f"shards:{path}",)), tokenizer, "train")


def test_shards_of_another_tokenizer_are_refused(prepared, tmp_path, byte_tokenizer):
    from mor_jax.data.tokenizers.train_bpe import train_bpe

    (tmp_path / "tokenizer.json").write_text(train_bpe(["some text"], 260))
    other = load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*Set data\.tokenizer='bytes'"):
        open_at(prepared, other)


def test_missing_and_damaged_directories(prepared, tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match=r"data\.sources\[0\]=.*is not a directory"):
        open_at(tmp_path / "absent", byte_tokenizer)
    shard = prepared / "train-00001.array_record"
    os.truncate(shard, 100)
    with pytest.raises(ValueError, match=r"train-00001\.array_record has 100 bytes, expected"):
        open_at(prepared, byte_tokenizer)
    shard.unlink()
    with pytest.raises(ValueError, match="has None bytes, expected"):
        open_at(prepared, byte_tokenizer)
    manifest = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        open_at(prepared, byte_tokenizer)
    (prepared / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        open_at(prepared, byte_tokenizer)


def test_the_script(jsonl, tmp_path, capsys):
    arguments = [f"--source={jsonl}", f"--output={tmp_path}/out"]
    command = [sys.executable, str(ROOT / "launch" / "prepare_data.py"), *arguments]
    done = subprocess.run([*command, "--validation-fraction=0.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"data.sources=('shards:{tmp_path}/out',)" in done.stdout
    assert "60 documents" in done.stderr
    assert prepare_data.main([*arguments, "--validation-fraction=0.3"]) == 2
    assert "other settings" in capsys.readouterr().err
