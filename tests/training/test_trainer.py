"""Whole runs: settings refused in time, signals, taking a run up again, steps that go wrong."""

import concurrent.futures
import dataclasses
import itertools
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from support.patience import PATIENCE
from support.tiny import TINY, train_config

from mor_jax import data
from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
)
from mor_jax.models.params import abstract_params
from mor_jax.observability import event_log
from mor_jax.observability.goodput import goodput
from mor_jax.observability.metrics import read
from mor_jax.training import run, trainer
from mor_jax.training.trainer import Diverged, Stopped, fit
from mor_jax.types import IGNORE

EVAL = EvalConfig(interval=None, batches=1, batch_size=8, prompt="", completion_tokens=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty short texts."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(20)))
    return DataConfig(sources=(f"text:{folder}/*.txt",), validation_fraction=0.2)


def config(corpus, name="plain", layers=1, model=None, **changes):
    """Bytes in rows of 16, eight rows a step, everything logged."""
    model = dataclasses.replace(TINY[name], vocab_size=256, num_layers=layers, **(model or {}))
    base = train_config(steps=6, batch_size=8, model=model, data=corpus, eval=EVAL)
    log, checkpoint = LogConfig(interval=1), CheckpointConfig(interval=2)
    cfg = dataclasses.replace(base, log=log, checkpoint=checkpoint)
    return dataclasses.replace(cfg, **changes)


def routed(corpus):
    """Expert-choice, whose capacities change after step 2 of 5."""
    router = dataclasses.replace(
        TINY["expert"].router, capacity_warmup_steps=3, capacity_warmup_stages=1
    )
    model = {"sharing": "cycle", "num_recursions": 2, "router": router}
    return config(corpus, "expert", layers=2, model=model, steps=5)


def saved_state(cfg, directory, step=None):
    """Step of a checkpoint, by default the newest, and its arrays."""
    with Checkpointer(directory, cfg.checkpoint) as checkpoints:
        zero = jax.ShapeDtypeStruct((), "int32")
        params = abstract_params(cfg.model)
        abstract = {name: zero for name in ("step", "skipped", "skipped_in_a_row")}
        abstract |= {"params": params, "opt_state": {"count": zero, "mu": params, "nu": params}}
        restored = checkpoints.restore(abstract, step)
    return restored.step, restored.state


def records(directory):
    """What was logged, but for times."""
    kept = [dict(record) for record in read(directory / "metrics.jsonl")]
    return [{k: v for k, v in r.items() if k not in ("time", "tokens_per_second")} for r in kept]


def kill_self(kind=signal.SIGTERM):
    """As a scheduler does it."""
    os.kill(os.getpid(), kind)


def interrupt(monkeypatch, at, kind=signal.SIGTERM, heldout=1):
    """Sends this process a signal when the batch of step `at` is placed on the devices.

    heldout: batches that are placed there before.
    """
    real, placed = run.place, []

    def place(mesh, batch):
        placed.append(batch)
        if len(placed) == at + heldout:
            kill_self(kind)
        return real(mesh, batch)

    monkeypatch.setattr(run, "place", place)
    monkeypatch.setattr(trainer, "place", place)


def assert_same_run(cfg, one, other):
    """Both are through, with the same arrays and the same records."""
    assert records(one) == records(other)
    (step, a), (_, b) = (saved_state(cfg, directory) for directory in (one, other))
    assert step == a["step"] == cfg.steps
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_taken_up_again_equals_one_never_stopped(corpus, tmp_path, monkeypatch):
    cfg, kind = routed(corpus), signal.SIGUSR1
    fit(cfg, tmp_path / "whole")
    handler = signal.getsignal(kind)
    with monkeypatch.context() as patch:
        interrupt(patch, at=2, kind=kind)
        with pytest.raises(Stopped, match=r"SIGUSR1: stopped after step 2, saved in"):
            fit(cfg, tmp_path / "parts")
    assert signal.getsignal(kind) is handler
    assert saved_state(cfg, tmp_path / "parts")[0] == 2
    fit(cfg, tmp_path / "parts")
    assert_same_run(cfg, tmp_path / "whole", tmp_path / "parts")
    found = records(tmp_path / "whole")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 5]
    assert [r["position"] for r in found[:5]] == [0, 8, 16, 24, 32]
    # Capacity warm-up: everybody goes all the way in steps 1 and 2, half of them afterwards.
    assert [r["depth_share"] for r in found[:5]] == [[0, 1]] * 2 + [[0.5, 0.5]] * 3
    assert {"eval/loss_topk", "eval/loss_causal"} <= found[-1].keys()
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run of six steps that nothing disturbed: its configuration and directory."""
    cfg = config(corpus, eval=dataclasses.replace(EVAL, interval=3, batches=2))
    directory = tmp_path_factory.mktemp("whole")
    fit(cfg, directory)
    return cfg, directory


@pytest.mark.parametrize("at", [0, 1], ids=["assembling", "first step"])
def test_before_the_first_finished_step_a_signal_ends_the_run_at_once(
    whole, tmp_path, monkeypatch, at
):
    cfg, directory = whole
    with monkeypatch.context() as patch:
        interrupt(patch, at, heldout=2)
        with pytest.raises(Stopped, match=r"SIGTERM: exited at once, no step was completed.*again"):
            fit(cfg, tmp_path / "run")
    # What was not claimed yet is as before; what was is taken up.
    assert (tmp_path / "run").exists() == (at == 1)
    assert not (tmp_path / "run" / "checkpoints").exists()
    fit(cfg, tmp_path / "run")
    assert_same_run(cfg, directory, tmp_path / "run")


def evaluator(monkeypatch, before_batch):
    """Calls `before_batch` with the number of each held-out batch that is evaluated, from 1."""
    real, seen = trainer.Evaluator.of.__func__, []

    def of(cls, cfg, batches):
        made = real(cls, cfg, batches)

        def step(*args):
            seen.append(0)
            before_batch(len(seen))
            return made.step(*args)

        return dataclasses.replace(made, step=step)

    monkeypatch.setattr(trainer.Evaluator, "of", classmethod(of))


@pytest.mark.parametrize("stuck", [False, True], ids=["between batches", "stuck in one"])
def test_an_evaluation_is_left_for_a_signal_and_made_up_for(whole, tmp_path, monkeypatch, stuck):
    (cfg, directory), done = whole, threading.Event()

    def before_batch(number):
        if number == 1:
            kill_self()
            # A compilation takes minutes and cannot be interrupted.
            assert not stuck or done.wait(PATIENCE)

    with monkeypatch.context() as patch:
        evaluator(patch, before_batch)
        with pytest.raises(Stopped, match=r"SIGTERM: stopped after step 3, saved in"):
            fit(cfg, tmp_path / "run")
    done.set()
    assert saved_state(cfg, tmp_path / "run")[0] == 3
    assert not any("eval/loss_causal" in record for record in records(tmp_path / "run"))
    for _ in range(0 if stuck else 2):
        # Taken up again and again from there, it has the evaluation once.
        with monkeypatch.context() as patch:
            interrupt(patch, at=1, heldout=2)
            with pytest.raises(Stopped, match="no step was completed"):
                fit(cfg, tmp_path / "run")
    fit(cfg, tmp_path / "run")
    assert_same_run(cfg, directory, tmp_path / "run")


def test_a_later_program_that_is_being_compiled_is_not_waited_for(whole, tmp_path, monkeypatch):
    cfg, directory = whole
    real = trainer.CompiledSteps.prepare

    def prepare(self, step):
        if step == 3:
            kill_self()
            # A compilation that takes for ever.
            return concurrent.futures.Future()
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.CompiledSteps, "prepare", prepare)
        with pytest.raises(Stopped, match=r"SIGTERM: stopped after step 2, saved in"):
            fit(cfg, tmp_path / "run")
    fit(cfg, tmp_path / "run")
    assert_same_run(cfg, directory, tmp_path / "run")


def test_a_signal_inside_a_save_and_clocks_that_jump(whole, tmp_path, monkeypatch):
    cfg, directory = whole
    real, now, jumps = Checkpointer.save, time.time, itertools.cycle([0, 86400, -86400])

    def save(self, step, *args):
        real(self, step, *args)
        if step == 2:
            kill_self()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save)
        patch.setattr(time, "time", lambda: now() + next(jumps))
        with pytest.raises(Stopped, match=r"SIGTERM: stopped after step 3, saved in"):
            fit(cfg, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() - next(jumps))
        fit(cfg, tmp_path / "run")
    assert_same_run(cfg, directory, tmp_path / "run")
    spent = goodput(event_log.read(tmp_path / "run" / "events.jsonl"))
    assert (spent.starts, spent.again) == (2, 0)
    assert spent.seconds and min(spent.seconds.values()) >= 0
    # Nothing of the jumps, by a day.
    assert spent.total < 43200


def test_what_this_machine_cannot_do_is_refused_before_anything_is_written(corpus, tmp_path):
    cfg = config(corpus, model={"remat": "offload"})
    with pytest.raises(
        ValueError, match=r"model\.remat='offload': needs a device other than the host CPU"
    ):
        fit(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_finished_run_does_not_train_again(corpus, tmp_path, capsys):
    cfg = config(corpus)
    fit(cfg, tmp_path / "run")
    before, seen = records(tmp_path / "run"), capsys.readouterr().out
    assert [r["step"] for r in before] == [1, 2, 3, 4, 5, 6, 6]
    assert before[5]["ce"] < before[0]["ce"]
    fit(cfg, tmp_path / "run")
    assert records(tmp_path / "run") == before
    # Both starts end with the same summary of the same model.
    name = "vanilla, 1 layers of width 32"
    assert name in seen
    assert name in capsys.readouterr().out
    # More steps go on from there.
    longer = dataclasses.replace(cfg, steps=7)
    fit(longer, tmp_path / "run")
    assert records(tmp_path / "run")[:7] == before
    assert saved_state(longer, tmp_path / "run")[0] == 7


def spoil(monkeypatch, *numbers):
    """Takes all targets from the batches that begin with these rows: their mean loss is 0/0."""
    real = data.TrainBatches.__next__

    def spoiled(self):
        number, batch = self.position, real(self)
        if number in numbers:
            batch = dataclasses.replace(batch, targets=np.full_like(batch.targets, IGNORE))
        return batch

    monkeypatch.setattr(data.TrainBatches, "__next__", spoiled)


def bad_data(corpus):
    """A run of twelve steps that goes back after three skipped ones."""
    optim = OptimConfig(warmup_steps=1, decay_steps=1, max_skipped_steps=3)
    return config(
        corpus, optim=optim, steps=12, checkpoint=CheckpointConfig(interval=2, max_to_keep=100)
    )


def logged(directory, *names):
    return [e for e in event_log.read(directory / "events.jsonl") if e["event"] in names]


def test_a_single_skipped_step_is_counted_with_its_batch(corpus, tmp_path, monkeypatch):
    cfg = dataclasses.replace(bad_data(corpus), steps=5)
    spoil(monkeypatch, 8, 24)
    fit(cfg, tmp_path / "run")
    skipped = logged(tmp_path / "run", "skipped")
    assert [(e["step"], e["position"]) for e in skipped] == [(2, 8), (4, 24)]
    found = records(tmp_path / "run")[:5]
    assert [(r["skipped"], r["skipped_in_a_row"]) for r in found] == [
        (0, 0), (1, 1), (1, 0), (2, 1), (2, 0),
    ]  # fmt: skip
    assert [r["position"] for r in found] == [0, 8, 16, 24, 32]
    # States amid skipped steps are no checkpoints: those due are written one step later.
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [3, 5]


def test_bad_data_is_jumped_over_once_also_by_a_run_taken_up_again(corpus, tmp_path, monkeypatch):
    cfg = bad_data(corpus)
    spoil(monkeypatch, 40, 48, 56)
    fit(cfg, tmp_path / "run")
    (back,) = logged(tmp_path / "run", "rollback")
    assert (back["from_step"], back["step"], back["jumped"]) == (8, 4, [40, 64])
    found = records(tmp_path / "run")[:12]
    assert [r["step"] for r in found] == list(range(1, 13))
    # Every batch once, but the bad ones; nothing was skipped in the history that counts.
    assert [r["position"] for r in found] == [*range(0, 40, 8), *range(64, 120, 8)]
    assert all(r["skipped"] == 0 for r in found)
    # Stopped amid the skipped steps, and after the rollback.
    for at in (7, 11):
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            with pytest.raises(Stopped):
                fit(cfg, tmp_path / f"at{at}")
        fit(cfg, tmp_path / f"at{at}")
        assert_same_run(cfg, tmp_path / "run", tmp_path / f"at{at}")


def test_the_second_time_the_run_stops_until_somebody_changes_something(
    corpus, tmp_path, monkeypatch
):
    cfg = bad_data(corpus)
    spoil(monkeypatch, 24, 32, 40, 64, 72, 80)
    message = r"max_skipped_steps=3: .*3 steps in a row, 6 to 8, sequences 64 to 87, again"
    with pytest.raises(Diverged, match=message) as caught:
        fit(cfg, tmp_path / "run")
    assert caught.value.code == 77
    # The rollback is remembered: the same command ends the same way.
    with pytest.raises(Diverged):
        fit(cfg, tmp_path / "run")
    assert len(logged(tmp_path / "run", "rollback")) == 1
    lower = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=1e-4))
    fit(lower, tmp_path / "run", ["optim.lr"])
    found = records(tmp_path / "run")[:12]
    assert [r["position"] for r in found] == [0, 8, 16, 48, 56, *range(88, 144, 8)]
    (changed,) = logged(tmp_path / "run", "changed")
    assert (changed["setting"], changed["old"], changed["new"]) == ("optim.lr", "0.003", "0.0001")


def test_a_run_that_explodes_stops_with_its_checkpoints_whole(corpus, tmp_path):
    # After an update of 1e37 nothing that is computed from the parameters is finite.
    optim = OptimConfig(
        lr=1e37, schedule="constant", warmup_steps=0, weight_decay=0.0, max_skipped_steps=3
    )
    cfg = config(
        corpus, optim=optim, steps=40, checkpoint=CheckpointConfig(interval=1, max_to_keep=100)
    )
    with pytest.raises(Diverged, match=r"optim\.max_skipped_steps=3: .* in 3 steps in a row"):
        fit(cfg, tmp_path / "run")
    assert [(e["step"], e["position"]) for e in logged(tmp_path / "run", "skipped")] == [
        (2, 8), (3, 16), (4, 24), (2, 32), (3, 40), (4, 48),
    ]  # fmt: skip
    step, last = saved_state(cfg, tmp_path / "run")
    assert step == 1 and last["skipped"] == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(last))


def wrong_settings(corpus):
    """(changes of a run's settings, message)."""
    model = config(corpus).model
    longer = dataclasses.replace(EVAL, prompt="abc", completion_tokens=62)
    return {
        "vocabulary": (
            {"model": dataclasses.replace(model, vocab_size=200)},
            r"model\.vocab_size=200: .*256",
        ),
        "seq_len": ({"seq_len": 65}, r"seq_len=65: must be between 2 and model\.max_seq_len=64"),
        "completion": ({"eval": longer}, r"eval\.completion_tokens=62: .* Use at most 61"),
        "rows": ({"batch_size": 12}, r"batch_size=12: must be a multiple of 8.* Try 16"),
        "parts": (
            {"batch_size": 8, "grad_accum_steps": 2},
            r"batch_size=8: must be a multiple of 16.*2 micro-batches\. Try 16",
        ),
        "heldout rows": (
            {"eval": dataclasses.replace(EVAL, batch_size=6)},
            r"eval\.batch_size=6: must be a multiple of 8",
        ),
        "mesh": (
            {"mesh": dataclasses.replace(config(corpus).mesh, data=3)},
            r"mesh=.*multiply to 3, but there are 8 devices",
        ),
        "parameters": (
            {
                "mesh": dataclasses.replace(config(corpus).mesh, data=1, tensor=8),
            },
            r"kv_heads=2: .*layers\.attention\.k is sharded over 8 devices",
        ),
        "source": (
            {"data": dataclasses.replace(corpus, sources=("text:/nowhere/*.txt",))},
            r"data\.sources",
        ),
        "tokenizer": ({"data": dataclasses.replace(corpus, tokenizer="/no/such")}, "/no/such"),
    }


def test_wrong_settings_are_refused_before_anything_is_written(corpus, tmp_path):
    for changes, message in wrong_settings(corpus).values():
        with pytest.raises(ValueError, match=message):
            fit(dataclasses.replace(config(corpus), **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_directories_of_others_are_left_alone(corpus, tmp_path):
    cfg = config(corpus)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis: is neither empty nor the directory of a run"):
        fit(cfg, foreign)
    assert [p.name for p in foreign.iterdir()] == ["chapter1.tex"]
    assert (foreign / "chapter1.tex").read_text() == "years of work"
    trainer.run_dir.claim_workdir(tmp_path / "run", dataclasses.replace(cfg, seed=1))
    with pytest.raises(ValueError, match=r"another configuration:\n  seed: 1 there, 0 now"):
        fit(cfg, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_other_batch_sizes_go_on_at_the_next_row(corpus, tmp_path, monkeypatch):
    cfg = config(corpus, steps=4, mesh=MeshConfig(data=1))
    mesh = trainer.sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    monkeypatch.setattr(trainer.sharding, "make_mesh", lambda _: mesh)
    fit(cfg, tmp_path / "run")
    kept = (tmp_path / "run" / "config.json").read_bytes()
    # Refused before anything is written, although it was allowed.
    for changes, setting in (({"seq_len": 32}, "seq_len"), ({"seed": 5}, "seed")):
        other = dataclasses.replace(cfg, steps=6, **changes)
        with pytest.raises(
            ValueError, match=rf"^{setting}=\d+: 32 sequences of .*is unknown which"
        ):
            fit(other, tmp_path / "run", [setting])
        assert (tmp_path / "run" / "config.json").read_bytes() == kept
    for steps, batch_size in ((6, 4), (7, 12)):
        other = dataclasses.replace(cfg, steps=steps, batch_size=batch_size)
        fit(other, tmp_path / "run", ["batch_size"])
    found = [r["position"] for r in records(tmp_path / "run") if "position" in r]
    assert found == [0, 8, 16, 24, 32, 36, 40]
    with Checkpointer(tmp_path / "run", cfg.checkpoint) as checkpoints:
        assert checkpoints.facts()["position"] == 52
