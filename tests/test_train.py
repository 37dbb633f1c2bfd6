"""Whole runs: settings refused in time, signals, taking a run up again, steps that go wrong."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from tiny import TINY, train_config

from mor_jax import train
from mor_jax.checkpoint import Checkpoints
from mor_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, OptimConfig
from mor_jax.metrics import read
from mor_jax.state import abstract_params
from mor_jax.train import Stopped, fit

EVAL = EvalConfig(every=None, batches=1, batch_size=8, prompt="", completion_tokens=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty short texts."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(20)))
    return DataConfig(sources=(f"text:{folder}/*.txt",), heldout_share=0.2)


def config(corpus, name="plain", layers=1, model=None, **changes):
    """Bytes in rows of 16, eight rows a step, everything logged."""
    model = dataclasses.replace(TINY[name], vocab_size=256, layers=layers, **(model or {}))
    base = train_config(steps=6, batch_size=8, model=model, data=corpus, eval=EVAL)
    log, checkpoint = LogConfig(every=1), CheckpointConfig(every=2)
    cfg = dataclasses.replace(base, log=log, checkpoint=checkpoint)
    return dataclasses.replace(cfg, **changes)


def routed(corpus):
    """Expert-choice, whose capacities change after step 2 of 5."""
    router = dataclasses.replace(
        TINY["expert"].router, capacity_warmup_steps=3, capacity_warmup_levels=1
    )
    model = {"sharing": "cycle", "recursions": 2, "router": router}
    return config(corpus, "expert", layers=2, model=model, steps=5)


def saved_state(cfg, directory, step=None):
    """Step of a checkpoint, by default the newest, and its arrays."""
    with Checkpoints(directory, cfg.checkpoint) as checkpoints:
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


def interrupt(monkeypatch, at, kind):
    """Sends this process a signal when the batch of step `at` is placed on the devices."""
    real, placed = train.place, []

    def place(mesh, batch):
        placed.append(batch)
        # The first one is the held-out batch.
        if len(placed) == at + 1:
            os.kill(os.getpid(), kind)
        return real(mesh, batch)

    monkeypatch.setattr(train, "place", place)


def test_a_run_taken_up_again_equals_one_never_stopped(corpus, tmp_path, monkeypatch):
    cfg, kind = routed(corpus), signal.SIGTERM
    fit(cfg, tmp_path / "whole")
    handler = signal.getsignal(kind)
    with monkeypatch.context() as patch:
        interrupt(patch, at=1, kind=kind)
        with pytest.raises(Stopped, match=r"SIGTERM: stopped after step 1, saved in"):
            fit(cfg, tmp_path / "parts")
    assert signal.getsignal(kind) is handler
    assert saved_state(cfg, tmp_path / "parts")[0] == 1
    fit(cfg, tmp_path / "parts")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    (step, whole), (_, parts) = (saved_state(cfg, tmp_path / d) for d in ("whole", "parts"))
    assert step == whole["step"] == cfg.steps
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    found = records(tmp_path / "whole")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 5]
    # Capacity warm-up: everybody goes all the way in steps 1 and 2, half of them afterwards.
    assert [r["depth_share"] for r in found[:5]] == [[0, 1]] * 2 + [[0.5, 0.5]] * 3
    assert {"eval/loss_topk", "eval/loss_causal"} <= found[-1].keys()
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000


def test_a_finished_run_does_not_train_again(corpus, tmp_path, capsys):
    cfg = config(corpus)
    fit(cfg, tmp_path / "run")
    before, seen = records(tmp_path / "run"), capsys.readouterr().out
    assert [r["step"] for r in before] == [1, 2, 3, 4, 5, 6, 6]
    assert before[5]["ce"] < before[0]["ce"]
    fit(cfg, tmp_path / "run")
    assert records(tmp_path / "run") == before
    # Both starts end with the same summary of the same model.
    name = "plain model, 1 layers of width 32"
    assert name in seen
    assert name in capsys.readouterr().out
    # More steps go on from there.
    longer = dataclasses.replace(cfg, steps=7)
    fit(longer, tmp_path / "run")
    assert records(tmp_path / "run")[:7] == before
    assert saved_state(longer, tmp_path / "run")[0] == 7


def test_too_many_steps_without_finite_loss_stop_the_run(corpus, tmp_path):
    # After an update of 1e37 nothing that is computed from the parameters is finite.
    optim = OptimConfig(
        lr=1e37, schedule="constant", warmup_steps=0, weight_decay=0.0, max_skipped_steps=3
    )
    cfg = config(corpus, optim=optim, steps=40, checkpoint=CheckpointConfig(every=1, keep=100))
    with pytest.raises(Stopped, match=r"optim\.max_skipped_steps=3: .* in 3 steps in a row"):
        fit(cfg, tmp_path / "run")
    assert [r["skipped_in_a_row"] for r in records(tmp_path / "run")][:4] == [0, 1, 2, 3]
    _, first = saved_state(cfg, tmp_path / "run", step=1)
    step, last = saved_state(cfg, tmp_path / "run")
    assert step == last["skipped"] + 1 > 3
    for tree in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, first[tree], last[tree])
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(last[tree]))


def wrong_settings(corpus):
    """(changes of a run's settings, message)."""
    model = config(corpus).model
    longer = dataclasses.replace(EVAL, prompt="abc", completion_tokens=62)
    return {
        "vocabulary": (
            {"model": dataclasses.replace(model, vocab_size=200)},
            r"model\.vocab_size=200: .*256",
        ),
        "length": ({"length": 65}, r"length=65: must be between 2 and model\.max_length=64"),
        "completion": ({"eval": longer}, r"eval\.completion_tokens=62: .* Use at most 61"),
        "rows": ({"batch_size": 12}, r"batch_size=12: must be a multiple of 8.* Try 16"),
        "parts": (
            {"batch_size": 8, "accumulate": 2},
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
            r"kv_heads=2: .*layers\.attention\.k is cut over 8 devices",
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
    with pytest.raises(ValueError, match=r"thesis: is not empty and not the directory of a run"):
        fit(cfg, foreign)
    assert [p.name for p in foreign.iterdir()] == ["chapter1.tex"]
    assert (foreign / "chapter1.tex").read_text() == "years of work"
    train.workdir.claim_workdir(tmp_path / "run", dataclasses.replace(cfg, seed=1))
    with pytest.raises(ValueError, match=r"another configuration:\n  seed: 1 there, 0 now"):
        fit(cfg, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]
