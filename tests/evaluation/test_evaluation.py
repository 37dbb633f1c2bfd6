"""A run's weights, found and evaluated: whichever are newest, on the run's text or on other."""

import dataclasses
import importlib
import json
import math
import os
import shutil
import socket

import jax
import numpy as np
import pytest
import sentencepiece
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax import data
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.load_weights import load_run
from mor_jax.checkpoint.run_dir import claim_workdir, lock_run_dir
from mor_jax.checkpoint.run_status import TrainerStatus
from mor_jax.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig
from mor_jax.data.tokenizers.train_bpe import train_bpe
from mor_jax.distributed import mesh as sharding
from mor_jax.evaluation import EvalRequest, TextEvaluation, evaluate
from mor_jax.evaluation.byte_spans import TextBytes
from mor_jax.evaluation.plot import check_path, draw
from mor_jax.evaluation.results import FILE, EvalLog
from mor_jax.evaluation.watch_checkpoints import CheckpointWatcher
from mor_jax.inference.calibration_file import fingerprint, load
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.runtime import exit_codes
from mor_jax.training.evaluator import Evaluator
from mor_jax.types import Batch

MODEL = dataclasses.replace(TINY["expert_cycle"], vocab_size=256, num_layers=2, num_recursions=2)
GIVEN, TRAINED = random_params(MODEL, 1), random_params(MODEL, 2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(20)))
    return folder


@pytest.fixture(scope="module")
def cfg(texts):
    return train_config(
        model=MODEL,
        batch_size=8,
        data=DataConfig(sources=(f"text:{texts}/*.txt",), validation_fraction=0.2),
        eval=EvalConfig(interval=None, batches=2, batch_size=8, prompt="", completion_tokens=0),
    )


@pytest.fixture(scope="module")
def imported(cfg, tmp_path_factory):
    """Weights to start from, no checkpoint."""
    workdir = tmp_path_factory.mktemp("imported")
    claim_workdir(workdir, cfg)
    pretrained.write(workdir, MODEL, from_arrays(dict(flatten(GIVEN))), {"from": "a/model"})
    return workdir


@pytest.fixture(scope="module")
def trained(cfg, tmp_path_factory):
    """Two checkpoints, the first of other weights; the second with everything that a run keeps."""
    workdir = tmp_path_factory.mktemp("trained")
    claim_workdir(workdir, cfg)
    with Checkpointer(workdir, CheckpointConfig()) as checkpoints:
        for step, params in ((1, GIVEN), (2, TRAINED)):
            state = {"params": params, "opt_state": {"mu": params, "nu": params}}
            checkpoints.save(step, state, 0, cfg.to_dict())
    return workdir


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_newest_weights_are_found(imported, trained):
    one, other = load_run(imported), load_run(trained)
    assert (one.step, other.step) == (0, 2)
    assert str(one) == f"{imported}, imported weights of a/model"
    assert str(other) == f"{trained}, step 2"
    assert one.source == {"from": "a/model"} and other.source is None
    same(one.params(), GIVEN)
    same(other.params(), TRAINED)
    same(load_run(trained, 1).params(), GIVEN)
    same(load_run(imported, 0).params(), GIVEN)


def test_parameters_arrive_where_they_are_wanted(imported, trained):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    where = sharding.param_shardings(mesh, logical_axes(MODEL), abstract_params(MODEL))
    for workdir, wanted in ((imported, GIVEN), (trained, TRAINED)):
        made = load_run(workdir).params(where)
        same(made, wanted)
        assert jax.tree.map(lambda x: x.sharding, made) == where


def test_what_is_not_there_is_refused(imported, trained, tmp_path, cfg):
    with pytest.raises(ValueError, match=r"is not the directory of a run: it has no config\.json"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no complete checkpoint of this step.*\[1, 2\]"):
        load_run(trained, 3)
    with pytest.raises(ValueError, match="there is no complete checkpoint of this step"):
        load_run(imported, 3)
    claim_workdir(tmp_path / "new", cfg)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_run(tmp_path / "new")
    with pytest.raises(ValueError, match="is not a regular file"):
        EvalLog("/dev/zero", {})
    with pytest.raises(ValueError, match="fsdp=0: must be greater than 0"):
        evaluate(load_run(trained), EvalRequest(fsdp=0))


def test_evaluation_is_that_of_the_run_itself(trained, cfg):
    found = evaluate(load_run(trained), EvalRequest(fsdp=4))
    tokenizer = data.load_tokenizer("bytes")
    layout = data.Layout(length=cfg.seq_len, batch_size=8)
    batches = data.validation_batches(cfg.data, tokenizer, layout, 2)
    wanted = Evaluator.of(cfg, batches)(TRAINED)
    for name, value in wanted.items():
        assert found.values[name] == pytest.approx(value, rel=1e-4), name
    assert found.values["leak"] == pytest.approx(wanted["loss_causal"] - wanted["loss_topk"], 1e-2)
    assert found.text.startswith("validation split of text:") and found.rows == 16
    # Groups add up to the whole, under both routings.
    for mode in ("causal", "topk"):
        for groups in (found.values["by_position"], found.values["by_depth"]):
            counts = [group[f"targets_{mode}"] for group in groups]
            losses = [group[f"loss_{mode}"] or 0.0 for group in groups]
            assert sum(counts) == found.values["targets"] == 16 * 16
            mean = np.dot(counts, losses) / sum(counts)
            assert mean == pytest.approx(found.values[f"loss_{mode}"], rel=1e-6)


def test_other_text_is_used_whole(trained, tmp_path, cfg):
    (tmp_path / "one.txt").write_text("A single document. " * 12)
    source = f"text:{tmp_path}/*.txt"
    tokens = 12 * len("A single document. ") + 1
    for size, batches in ((8, 9), (8 * 10**20, 10**20)):
        # However many are asked for: no more rows are computed than the devices need.
        asked = EvalRequest(sources=(source,), length=16, batches=batches, batch_size=size)
        whole = TextEvaluation(cfg, asked)
        assert {len(batch.tokens) for batch in whole._batches} == {8 if size == 8 else 16}
        # A row needs one token more than it is long: the last target.
        assert len(whole._sources) == (tokens - 1) // 16
    found = evaluate(load_run(trained), EvalRequest(sources=(source,), length=16, batches=9))
    assert (found.text, found.rows) == (source, (tokens - 1) // 16)
    with pytest.raises(
        ValueError, match=r"seq_len=65: must be between 2 and model\.max_seq_len=64"
    ):
        evaluate(load_run(trained), EvalRequest(length=65))
    with pytest.raises(ValueError, match=r"batch_size=4: must be a multiple of 8"):
        evaluate(load_run(trained), EvalRequest(batch_size=4))
    with pytest.raises(ValueError, match="is already split into"):
        evaluate(load_run(trained), EvalRequest(sources=("shards:data/tokens",)))


def test_sources_are_told_apart_and_bytes_are_those_of_the_text(trained, tmp_path):
    """Every target of a source once: all of its text but the first byte, and the ends."""
    letters = {"one": "\u00e9 \u4e16" * 20, "two": "abc" * 43}
    for name, text in letters.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sources = tuple(f"text:{tmp_path}/{name}.txt" for name in letters)
    found = evaluate(load_run(trained), EvalRequest(sources=sources, length=16, batches=9)).values
    one, two = found["sources"]
    assert (one["source"], two["source"]) == sources
    assert (one["targets"], two["targets"]) == (112, 128)  # 120 and 129 bytes in whole rows of 16
    assert (one["bytes"], two["bytes"], found["bytes"]) == (112, 128, 240)
    assert found["document_ends"] == 0
    nats = sum(part["targets"] * part["loss_topk"] for part in (one, two))
    assert nats / 240 == pytest.approx(found["loss_topk"], rel=1e-6)
    bits = found["bits_per_byte_causal"]
    assert bits == pytest.approx(found["loss_causal"] / math.log(2), rel=1e-6)


def test_bytes_of_subwords_are_exact(tmp_path):
    """Of byte pairs, and of SentencePiece, which writes a space that no text has."""
    texts = [f"The caf\u00e9 {i} of \u4e16\u754c.  Two spaces, {i * i} words." for i in range(99)]
    (tmp_path / "tokenizer.json").write_text(train_bpe(texts, 300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("tokenizer.json", "pieces.model"):
        tokenizer = data.load_tokenizer(str(tmp_path / name))
        eos = [tokenizer.eos_id]
        stream = np.concatenate([eos, *([*row, *eos] for row in tokenizer.encode_batch(texts))])
        stream = stream.astype(np.int32)[None]
        counted, ends = TextBytes(tokenizer)(Batch(stream[:, :-1], stream[:, 1:]))
        assert (counted[0], ends[0]) == (sum(len(text.encode()) for text in texts), len(texts))


def test_every_checkpoint_is_evaluated_once(cfg, tmp_path):
    """Those that are there, those that come; what the run deletes meanwhile is skipped."""
    claim_workdir(tmp_path, cfg)
    state = {"params": GIVEN, "opt_state": {"mu": GIVEN}}

    def save(*steps):
        with Checkpointer(tmp_path, CheckpointConfig(max_to_keep=9)) as checkpoints:
            for step in steps:
                checkpoints.save(step, state, 0, cfg.to_dict())

    def found(checkpoint):
        if checkpoint.step == 1:
            shutil.rmtree(tmp_path / "checkpoints" / f"{2:08d}")
        return {"text": {"checkpoint": checkpoint.step}}

    def watched(asked):
        records = EvalLog(tmp_path / FILE, asked)
        watch = CheckpointWatcher(
            tmp_path, records, report=news.append, wait=lambda _: save(cfg.steps)
        )
        return [(record["step"], record["text"]) for record in watch(found)]

    save(1, 2)
    news: list[str] = []
    assert watched({"length": 16}) == [(1, {"checkpoint": 1}), (8, {"checkpoint": 8})]
    assert news[0] == "step 2: skipped, the run deleted this checkpoint"
    waits = (
        f"waiting for checkpoints of {tmp_path} up to step {cfg.steps}; no process is training it"
    )
    assert news[1].startswith(waits) and len(news) == 2
    assert watched({"length": 16}) == []
    # A process that is killed may leave half a line.
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 1, "asked": {"len')
    (tmp_path / "checkpoints" / f"{2:08d}").mkdir()
    news.clear()
    found_again = watched({"length": 8})
    assert [step for step, _ in found_again] == [1, 8]
    assert EvalLog(tmp_path / FILE, {"length": 16}).steps() == {1, 8}
    with pytest.raises(ValueError, match="not a record of an evaluation"):
        EvalLog(tmp_path / "config.json", {})


def test_who_waits_is_told_who_trains(cfg, tmp_path, monkeypatch):
    claim_workdir(tmp_path, cfg)
    trainer = TrainerStatus(tmp_path)
    assert trainer() == ""
    with lock_run_dir(tmp_path):
        assert trainer() == f"process {os.getpid()} on {socket.gethostname()}"
    assert trainer() == ""
    # Where there are no locks, a holder writes signs of life.
    times, lock = iter((0.0, 1.0, 29.0, 32.0, 33.0, 34.0)), tmp_path / "lock"
    trainer = TrainerStatus(tmp_path, clock=lambda: next(times))
    for sign, owner in (("1", "another process"), ("1", "another process"), ("1", ""), ("2", "a")):
        lock.write_text(sign)
        assert bool(trainer._by_heartbeat()) == bool(owner)
    lock.unlink()
    assert trainer._by_heartbeat() == ""
    # Told once, and again when it changes.
    found, news = ["", "", "process 1 on a", "process 1 on a", ""], []
    watch = CheckpointWatcher(
        tmp_path, EvalLog(tmp_path / FILE, {}), report=news.append, wait=lambda _: None
    )
    monkeypatch.setattr(watch, "_trainer", lambda: found.pop(0))
    with pytest.raises(IndexError):
        list(watch(lambda checkpoint: {}))
    ends = [
        "no process is training it",
        "process 1 on a is training it",
        "no process is training it",
    ]
    assert [end in line for end, line in zip(ends, news, strict=True)] == [True] * 3


def test_a_calibration_of_other_weights_is_refused_with_what_would_do(trained, tmp_path):
    values = {"step": 1, "recursions": 2, "thresholds": [0.0, 0.0], "wanted": [1.0, 0.5]}
    values |= {"shares": [1.0, 0.5], "loss": 1.0, "text": "it", "tokens": 9}
    newest, file = load_run(trained), tmp_path / "made.json"
    for weights, step, fix in (
        (fingerprint(load_run(trained, 1)), 1, "Give --step=1, or calibrate these"),
        # Of another run, at the step that is there, at another one, at one that is not.
        ("other", 2, "Calibrate these with mor calibrate"),
        ("other", 1, "Calibrate these with mor calibrate"),
        ("other", 9, "Calibrate these with mor calibrate"),
    ):
        file.write_text(json.dumps(values | {"weights": weights, "step": step}))
        with pytest.raises(
            ValueError, match=rf"other weights \(step {step}\) than.*step 2\. {fix}$"
        ):
            load(newest, str(file))


def test_the_command_prints_a_table_or_json(trained, imported, tmp_path, capsys):
    command = importlib.import_module("mor_jax.cli.evaluate")
    few = ["--batches=1", "--length=16"]
    assert command.main([f"--workdir={imported}", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{imported}, imported weights of a/model"
    assert [line.split()[0] for line in lines[4:6]] == ["causal", "top-k"]
    assert command.main([f"--workdir={trained}", "--json", *few]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["rows"], told["length"]) == (2, 8, 16)
    assert told["perplexity_causal"] == pytest.approx(math.exp(told["loss_causal"]))
    assert [line.split()[0] for line in lines if line.startswith(("0 ", "8-15"))] == ["0", "8-15"]
    row = lines[4].split()
    assert float(row[2]) == pytest.approx(math.exp(float(row[1])), rel=1e-3)
    assert command.main([f"--workdir={imported}", *few, f"--figure={tmp_path}/loss.png"]) == 0
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    for name in ("loss.png", "loss.svg", "loss.pdf"):
        # What was drawn here may be drawn again, somebody's picture may not.
        draw(told, tmp_path / name)
        check_path(tmp_path / name)
        (tmp_path / name).write_bytes(b"\x89PNG holidays")
        with pytest.raises(ValueError, match="is not the plot of an evaluation"):
            draw(told, tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"\x89PNG holidays"
    assert command.main([f"--workdir={imported}", *few, f"--output={tmp_path}/a.jsonl"]) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"]["rows"] == 8
    capsys.readouterr()
    assert command.main([f"--workdir={tmp_path}"]) != 0
    assert capsys.readouterr().err.startswith(f"error: --workdir={str(tmp_path)!r}: is not the dir")
    for told, *wrong in (
        ("--batches=0: must be greater than 0", "--batches=0"),
        ("--source='text:nowhere': matches no file", "--source=text:nowhere"),
        ("--fsdp=3: must divide the 8 devices", "--fsdp=3"),
        ("--batch_size=3: must be a multiple of 8", "--batch_size=3"),
        ("--step=7: there is no complete checkpoint of this step in ", "--step=7"),
        ("--poll=nan: must be seconds in (0, 86400]", "--watch", "--poll=nan"),
    ):
        assert command.main([f"--workdir={trained}", *wrong]) == exit_codes.REFUSED
        assert capsys.readouterr().err.startswith(f"error: {told}")
