"""Runs that start from imported weights: bit for bit, on a mesh, with a recipe that is open."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax import data
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.run_dir import Change, check_workdir, claim_workdir
from mor_jax.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig, OptimConfig
from mor_jax.models.params import abstract_params
from mor_jax.observability.event_log import read
from mor_jax.training.trainer import fit
from mor_jax.types import IGNORE

MODEL = dataclasses.replace(TINY["plain"], vocab_size=256, num_layers=1)
ROUTED = dataclasses.replace(TINY["expert_cycle"], vocab_size=256, num_layers=2, num_recursions=2)
PARAMS = random_params(MODEL)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """One step, whose update has rate 0, over eight devices that each hold a part."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(20)))
    return train_config(
        model=MODEL,
        steps=1,
        batch_size=8,
        optim=OptimConfig(warmup_steps=1, decay_steps=0, max_skipped_steps=2),
        data=DataConfig(sources=(f"text:{folder}/*.txt",), validation_fraction=0.2),
        eval=EvalConfig(interval=None, batches=1, batch_size=8, prompt="", completion_tokens=0),
        checkpoint=CheckpointConfig(interval=1),
        mesh=MeshConfig(data=1, fsdp=8),
    )


def import_into(path, cfg):
    """What an import leaves: the weights, and a configuration with some recipe."""
    claim_workdir(path, dataclasses.replace(cfg, steps=5000, batch_size=64, seq_len=64))
    params = from_arrays(dict(flatten(random_params(cfg.model))))
    pretrained.write(path, cfg.model, params, {"from": "a/model"})
    return path


@pytest.fixture
def workdir(cfg, tmp_path):
    return import_into(tmp_path / "run", cfg)


def saved(workdir, step=1):
    with Checkpointer(workdir, CheckpointConfig()) as checkpoints:
        return checkpoints.parameters(abstract_params(MODEL), step)


def test_a_run_starts_from_the_weights_in_its_directory(cfg, workdir, capsys):
    fit(cfg, workdir)
    jax.tree.map(np.testing.assert_array_equal, saved(workdir), PARAMS)
    (fresh,) = [event for event in read(workdir / "events.jsonl") if event["event"] == "fresh"]
    assert fresh["weights"] == "imported weights of a/model"
    told = capsys.readouterr().out
    assert told.count("starts from imported weights of a/model") == 1
    assert "1 steps in" in told and ", started from imported weights of a/model" in told
    assert json.loads((workdir / "config.json").read_text())["steps"] == 1
    # It goes on from its checkpoint: the weights that it began with are not needed any more.
    (workdir / "initial" / "manifest.json").write_text("{}")
    fit(dataclasses.replace(cfg, steps=2), workdir)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), saved(workdir, 2), PARAMS)
    assert all(jax.tree.leaves(changed))


def test_skipped_steps_before_any_checkpoint_lead_back_to_these_weights(cfg, workdir, monkeypatch):
    real = data.TrainBatches.__next__

    def without_targets(self):
        number, batch = self.position, real(self)
        if number >= 2 * cfg.batch_size:
            return batch
        return dataclasses.replace(batch, targets=np.full_like(batch.targets, IGNORE))

    monkeypatch.setattr(data.TrainBatches, "__next__", without_targets)
    optim = dataclasses.replace(cfg.optim, warmup_steps=3)
    longer = dataclasses.replace(cfg, steps=3, optim=optim)
    fit(
        dataclasses.replace(longer, checkpoint=CheckpointConfig(interval=1, max_to_keep=9)), workdir
    )
    (back,) = [event for event in read(workdir / "events.jsonl") if event["event"] == "rollback"]
    assert (back["from_step"], back["step"], back["jumped"]) == (2, 0, [0, 2 * cfg.batch_size])
    jax.tree.map(np.testing.assert_array_equal, saved(workdir), PARAMS)


def test_damaged_weights_are_refused_and_nothing_is_claimed(cfg, workdir):
    file = workdir / "initial" / "arrays" / "norm.scale.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"norm\.scale\.safetensors has .* bytes, expected"):
        fit(dataclasses.replace(cfg, compilation_cache=False), workdir)
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    after.pop(workdir / "lock", None)
    assert {path for path in after if "hosts" not in path.parts} == before.keys()
    assert all(after[path] == content for path, content in before.items())


def test_before_the_first_checkpoint_only_what_the_weights_mean_stands_firm(cfg, tmp_path):
    cfg = dataclasses.replace(cfg, model=ROUTED)
    workdir = import_into(tmp_path / "run", cfg)
    router = dataclasses.replace(ROUTED.router, capacity_warmup_steps=7, aux_loss_coeff=0.1)
    model = dataclasses.replace(ROUTED, router=router, dtype="bfloat16", remat="full")
    other = dataclasses.replace(cfg, model=model, seed=9, batch_size=2, data=DataConfig())
    assert check_workdir(workdir, other) == []
    longer = dataclasses.replace(other, model=dataclasses.replace(model, max_seq_len=128))
    worded = dataclasses.replace(longer, data=DataConfig(tokenizer="words"))
    with pytest.raises(ValueError) as error:
        check_workdir(workdir, worded)
    for text in (
        "holds imported weights of another model:",
        "data.tokenizer: 'bytes' there, 'words' now",
        "model.max_seq_len: 64 there, 128 now",
        f"--config=from_workdir:{workdir}",
        "--allow_changes=data.tokenizer,model.max_seq_len",
    ):
        assert text in str(error.value)
    assert "seed" not in str(error.value) and "delete" not in str(error.value)
    allowed = [Change("model.max_seq_len", "64", "128")]
    assert check_workdir(workdir, longer, ["model.max_seq_len"]) == allowed
    # From the first checkpoint on it is a run like any other.
    with Checkpointer(workdir, cfg.checkpoint) as checkpoints:
        checkpoints.save(1, {"params": PARAMS}, 0, cfg.to_dict())
    with pytest.raises(ValueError, match=r"another configuration:(?s:.)*seed: 0 there, 9 now"):
        check_workdir(workdir, other)
