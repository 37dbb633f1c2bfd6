"""The evidence's runs are equal in what it says, and its tables say what the runs did."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from evidencing.planning import make
from evidencing.report import report
from evidencing.variants import ABLATIONS, MAIN

from mor_jax.scaling.runs.points import Point

STEPS, SEEDS = 500, 2


@pytest.fixture(scope="module")
def manifest():
    return make(STEPS, SEEDS, 1)


def test_every_variant_runs_at_equal_tokens_and_at_equal_flops(manifest):
    tokens = STEPS * manifest.base["batch_size"] * manifest.base["seq_len"]
    flops = manifest.rules["equal_flops"]
    for variant in MAIN:
        runs = [run for run in manifest.runs if run.architecture == variant.name]
        assert {run.seed for run in runs if run.tokens == tokens} == set(range(SEEDS))
        equal = [run for run in runs if run.flops == pytest.approx(flops, rel=5e-3)]
        assert {run.seed for run in equal} == set(range(SEEDS))
    changed = {variant.name for group in ABLATIONS.values() for variant in group}
    assert changed <= {run.architecture for run in manifest.runs}
    effective = {run.effective for run in manifest.runs}
    assert len(effective) == 1


def test_the_tables_say_what_the_runs_did(manifest):
    points = [
        Point(
            run=run.name,
            architecture=run.architecture,
            size=run.size,
            budget=run.budget,
            seed=run.seed,
            unique=run.unique,
            effective=run.effective,
            tokens=run.tokens,
            flops=run.flops,
            flops_per_token=run.flops_per_token,
            loss_causal=2.0 + 0.1 * run.seed + 0.5 * (run.architecture == "mor-3"),
            loss_topk=2.0 if "mor" in run.architecture else None,
            depth=1.5,
        )
        for run in manifest.runs
    ]
    timed = {v.name: {"seconds": 0.1, "temp_bytes": 2**20} for v in MAIN}
    timed["mor-3"] = {"seconds": 0.08, "temp_bytes": 2**19}
    machine = {"date": "2026-01-01", "cores": 2, "device": "a processor", "jax": "0"}
    text = report(manifest, points, timed, machine)
    rows = [line for line in text.splitlines() if line.startswith("| mor-3 ")]
    assert len(rows) == 2
    for row in rows:
        assert "2.5500 ± 0.0707 | +0.5000 | 2.0000 ± 0.0000 | +0.5500" in row
        assert "80.0 ms (0.80) | 0.5 MiB (0.50)" in row
    assert text.count("the default") == 4
