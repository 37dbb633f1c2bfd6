"""The benchmarks' machinery: turns, records, the real step; not their numbers."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.seeded import random_params
from support.tiny import train_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import step_time
import timing
import upcycle

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.convert.imported_model import ImportedModel
from mor_jax.convert.init_strategies import STRATEGIES
from mor_jax.models.flops import computed_shares, flops
from mor_jax.models.params import abstract_params


def test_variants_take_turns_and_all_calls_after_warmup_are_timed():
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = timing.interleaved(steps, warmup=1, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_trainer_takes_the_projects_steps():
    trainer = timing.Trainer(train_config("token"), step_time.spread_router)
    before = jax.tree.map(lambda leaf: leaf.copy(), trainer.state.params)
    trainer.step()
    trainer.step()
    assert int(trainer.state.step) == 2
    assert len(trainer.losses) == 2
    assert trainer.temp_bytes > 0
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, trainer.state.params)
    assert all(jax.tree.leaves(moved))
    shares = step_time.realised_shares(trainer)
    assert shares[0] == 1
    # A router that spreads its tokens sends some of them to every depth.
    assert 1 > shares[1] > shares[2] > 0


def test_a_report_is_printed_and_appended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    timing.report("question", {"ratio": 0.5}, save=False)
    assert not list(tmp_path.iterdir())
    timing.report("question", {"ratio": 0.5}, save=True)
    timing.report("question", {"ratio": 0.6}, save=True)
    lines = (tmp_path / "question.jsonl").read_text().splitlines()
    assert [json.loads(line)["ratio"] for line in lines] == [0.5, 0.6]
    assert {"benchmark", "date", "device", "cores", "jax"} <= json.loads(lines[0]).keys()
    assert capsys.readouterr().out.splitlines()[1:] == lines


def test_upcycling_starts_from_every_strategy_beside_the_plain_and_the_random():
    plain = dataclasses.replace(train_config("plain").model, num_layers=8)
    imported = ImportedModel(plain, from_arrays(dict(flatten(random_params(plain)))), None, {})
    found = list(upcycle.starts(imported, 3))
    assert [name for _, name, _ in found[1:7]] == [*STRATEGIES, "random weights"]
    assert {cfg.router.kind for _, _, cfg in found[7:]} == {"expert"} and len(found) == 13
    for family, start, cfg in (found[0], found[2], found[12]):
        made = upcycle.weights(imported, family, start, cfg)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, abstract_params(cfg))
    row = {"family": "recursive", "start": "average", "parameters": 67_300_000}
    row |= {"before": {"loss_causal": 9.0}, "after": {"loss_causal": 5.0}}
    row |= dict.fromkeys(upcycle.COMMON, 1)
    written = upcycle.page([row, row | {"steps": 60, "start": "lower"}])
    assert "| recursive | average | 67.3M | 9.000 | 5.000 | - | - |" in written
    assert written.count("| model | start |") == 2 and "1: 60 steps of 1 x 1 tokens" in written


def test_more_cores_than_there_are_is_refused():
    with pytest.raises(ValueError, match="--cores=100000"):
        timing.use_cores(100_000)
    before = os.sched_getaffinity(0)
    timing.use_cores(None)
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("size", ["small", "135m", "360m"])
def test_every_variant_has_a_valid_run_cheaper_than_the_plain_one(size):
    args = argparse.Namespace(
        size=size,
        length=512,
        batch=4,
        dtype="float32",
        attention="auto",
        remat="none",
        loss_chunk=0,
    )
    plain = step_time.train_config(args, "plain")
    assert plain.loss_chunk_size is None
    dear = flops(plain.model, 512).hardware()
    for name in step_time.ROUTED:
        model = step_time.train_config(args, name).model
        assert flops(model, 512).hardware() < dear
        assert computed_shares(model, 512)[-1] < 0.51
        assert abs(model.num_layers - plain.model.num_layers) <= 2


def test_ratios_are_over_the_plain_model():
    keys = ("seconds", "temp_bytes", "routed_flops", "hardware_flops")
    records = [dict.fromkeys(keys, 4.0), dict.fromkeys(keys, 3.0)]
    step_time.add_ratios(records)
    assert records[0]["seconds_ratio"] == 1
    assert records[1]["temp_bytes_ratio"] == 0.75
