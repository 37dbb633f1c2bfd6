"""A run that goes on over other devices: the same losses, the same data, whatever the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from support.tiny import TINY, train_config

from mor_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
)
from mor_jax.distributed import mesh as sharding
from mor_jax.observability.metrics import read
from mor_jax.training.trainer import fit

LEGS = {
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "data=8": MeshConfig(data=8),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "one device": MeshConfig(data=1),
}


def run_config(tmp_path):
    """With the learning rate the same however long the run is."""
    (tmp_path / "text.txt").write_text(" ".join(str(i * i) for i in range(3000)))
    (tmp_path / "more.txt").write_text(" ".join(str(i * 7) for i in range(3000)))
    model = dataclasses.replace(TINY["plain"], vocab_size=256, num_layers=1)
    return train_config(
        steps=8,
        batch_size=8,
        model=model,
        data=DataConfig(sources=(f"text:{tmp_path}/*.txt",), validation_fraction=0.5),
        eval=EvalConfig(interval=None, batches=1, batch_size=8, prompt="", completion_tokens=0),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0),
        log=LogConfig(interval=1),
        checkpoint=CheckpointConfig(interval=None),
    )


@pytest.fixture
def devices(monkeypatch):
    """`devices(1)`: from now on runs see so many of the eight."""
    real = sharding.make_mesh

    def use(count):
        monkeypatch.setattr(sharding, "make_mesh", lambda cfg: real(cfg, jax.devices()[:count]))

    return use


def steps_of(directory):
    """What was logged of each step, without evaluations."""
    return [record for record in read(directory / "metrics.jsonl") if "ce" in record]


def test_a_run_moves_from_mesh_to_mesh_and_its_numbers_stay(tmp_path, devices):
    cfg = run_config(tmp_path)
    devices(1)
    fit(dataclasses.replace(cfg, mesh=LEGS["one device"]), tmp_path / "still")
    for number, (name, mesh) in enumerate(LEGS.items(), start=1):
        devices(1 if name == "one device" else 8)
        # The last two steps of each leg are new ones.
        fit(dataclasses.replace(cfg, mesh=mesh, steps=2 * number), tmp_path / "moved")
    still, moved = (
        [r for r in read(tmp_path / d / "metrics.jsonl") if "ce" in r] for d in ("still", "moved")
    )
    assert [r["step"] for r in moved] == [r["step"] for r in still] == list(range(1, 9))
    assert [r["position"] for r in moved] == [r["position"] for r in still] == list(range(0, 64, 8))
    for key in ("ce", "loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in moved], [r[key] for r in still], rtol=1e-5)
    assert still[-1]["ce"] < still[0]["ce"] - 0.5
