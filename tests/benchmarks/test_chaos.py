"""A real run in processes of its own, killed and asked to end: as one that was left alone."""

import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chaos
from support.patience import PATIENCE

from mor_jax.observability import event_log
from mor_jax.runtime import exit_codes

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_killed_twice_and_stopped_once_ends_as_one_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "PATIENCE", PATIENCE)
    smaller = {"model.num_layers": 1, "eval.interval": 25, "optim.warmup_steps": 1}
    trial = chaos.Trial(
        config=str(ROOT / "configs" / "vanilla.py") + ":size=debug",
        settings=chaos.TINY | smaller,
        steps=60,
        per_start=15,
        environment={**os.environ, "JAX_PLATFORMS": "cpu"},
        output=tmp_path / "output.txt",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trial.complete(whole)
    chance = random.Random(0)
    for aim, kind, code in (
        ("save", signal.SIGKILL, -signal.SIGKILL),
        ("steps", signal.SIGTERM, exit_codes.STOPPED),
        ("save", signal.SIGKILL, -signal.SIGKILL),
    ):
        kill = chaos.kill_once(trial, killed, aim, kind, chance)
        assert kill.code == code, trial.output.read_text()
        assert 0 < kill.step < trial.steps
    assert chaos.differences(trial, whole, killed) != []
    trial.complete(killed)
    assert chaos.differences(trial, whole, killed) == []
    names = [event["event"] for event in event_log.read(killed / "events.jsonl")]
    assert names.count("start") == 4
    assert names[-1] == "end"
    assert "stopped: SIGTERM: stopped after step" in trial.output.read_text()
