"""Runs that go on from a step of another: the same as if they had been run alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_trainer import config, corpus, records, saved_state

from mor_jax.checkpoint.checkpointer import INCOMPLETE
from mor_jax.config import CheckpointConfig, OptimConfig
from mor_jax.training.fork import Fork
from mor_jax.training.trainer import fit

__all__ = ["corpus"]


def short(corpus, steps, **optim):
    """Ends after `steps`, the last two of them in the decay."""
    checkpoint = CheckpointConfig(interval=None, max_to_keep=1, keep_steps=(3,))
    cfg = dataclasses.replace(config(corpus), steps=steps, checkpoint=checkpoint)
    return dataclasses.replace(cfg, optim=OptimConfig(warmup_steps=2, decay_steps=2, **optim))


@pytest.fixture(scope="module")
def long(corpus, tmp_path_factory):
    """A finished run of 6 steps with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("long")
    fit(short(corpus, 6), folder / "run")
    return folder / "run"


def test_a_branch_is_the_shorter_run(corpus, long, tmp_path):
    cfg = short(corpus, 5)
    fit(cfg, tmp_path / "alone")
    fit(cfg, tmp_path / "branch", branch=Fork.parse(f"{long}@3"))
    expected, got = (saved_state(cfg, tmp_path / name) for name in ("alone", "branch"))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert records(tmp_path / "branch") == records(tmp_path / "alone")
    assert json.loads((tmp_path / "branch" / "branch.json").read_text()) == {"from": f"{long}@3"}
    # Once begun it goes on like any run, with its --branch or without.
    fit(cfg, tmp_path / "branch")
    fit(cfg, tmp_path / "branch", branch=Fork.parse(f"{long}@3"))
    with pytest.raises(ValueError, match="branched off"):
        fit(cfg, tmp_path / "branch", branch=Fork.parse(f"{long}@6"))


def test_an_interrupted_copy_is_made_again(corpus, long, tmp_path):
    cfg, run = short(corpus, 5), tmp_path / "run"
    # The other run is being written.
    with (long / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    fit(cfg, run, branch=Fork.parse(f"{long}@3"))
    for step in ("00000005", "00000003"):
        (run / "checkpoints" / step / INCOMPLETE).touch()
    with pytest.raises(ValueError, match=f"Start it with --branch={long}@3"):
        fit(cfg, run)
    fit(cfg, run, branch=Fork.parse(f"{long}@3"))
    assert saved_state(cfg, run)[0] == 5


def test_misfits_are_refused_and_leave_nothing(corpus, long, tmp_path):
    cases = {
        "no complete checkpoint of this step": (short(corpus, 5), f"{long}@4"),
        "optim.weight_decay: 0.1 there": (short(corpus, 5, weight_decay=0.2), f"{long}@3"),
        "differ from step 6 on": (short(corpus, 8), f"{long}@6"),
        "must be the directory of a run and one": (short(corpus, 5), f"{long}"),
        "there is no run in": (short(corpus, 5), f"{tmp_path}/nowhere@3"),
    }
    for told, (cfg, branch) in cases.items():
        with pytest.raises(ValueError, match=told):
            fit(cfg, tmp_path / "run", branch=Fork.parse(branch))
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="did not branch off"):
        fit(short(corpus, 6), long, branch=Fork.parse(f"{long}@3"))
