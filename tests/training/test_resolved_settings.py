"""Where a run trains decides on the multiple of its capacities, and its directory keeps it."""

import dataclasses
import json

import pytest
from support.tiny import EXPERT_ROUTER, TINY, train_config

from mor_jax.checkpoint import run_dir
from mor_jax.checkpoint.load_weights import load_run
from mor_jax.checkpoint.run_dir import check_workdir, claim_workdir, read_config
from mor_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    RouterConfig,
    TrainConfig,
)
from mor_jax.distributed import mesh as sharding
from mor_jax.planning import aot
from mor_jax.planning.alternatives import try_alternatives
from mor_jax.planning.build import make_plan
from mor_jax.training.resolved_settings import resolve_settings, resolve_settings_in
from mor_jax.training.trainer import fit

RUN = train_config("expert")
LONG = dataclasses.replace(
    RUN, seq_len=2048, model=dataclasses.replace(RUN.model, max_seq_len=2048)
)


def multiple(cfg: TrainConfig) -> int | None:
    return cfg.model.router.capacity_multiple


def with_multiple(cfg: TrainConfig, value: int | None) -> TrainConfig:
    router = dataclasses.replace(cfg.model.router, capacity_multiple=value)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, router=router))


def older(directory) -> None:
    """Makes the run in `directory` one of a version without the setting."""
    file = directory / "config.json"
    values = json.loads(file.read_text())
    del values["model"]["router"]["capacity_multiple"]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "gpu", "tpu"])
def test_accelerators_want_tiles_and_cpus_exact_numbers(platform):
    assert multiple(resolve_settings(LONG, platform)) == 128
    assert multiple(resolve_settings(LONG, "cpu")) == 1
    assert multiple(resolve_settings(with_multiple(LONG, 8), platform)) == 8
    assert multiple(resolve_settings(train_config("plain"), platform)) is None


def test_a_run_goes_on_elsewhere_with_its_own_capacities(tmp_path):
    first = resolve_settings_in([tmp_path], LONG, "cuda")
    claim_workdir(tmp_path, first)
    assert multiple(read_config(tmp_path)) == 128
    again = resolve_settings_in([tmp_path], LONG, "cpu")
    assert again == first
    assert check_workdir(tmp_path, again) == []
    with pytest.raises(ValueError, match=r"capacity_multiple: 128 there, 1 now"):
        check_workdir(tmp_path, resolve_settings_in([tmp_path], with_multiple(LONG, 1), "cpu"))


def test_an_older_run_keeps_exactly_its_capacities(tmp_path):
    claim_workdir(tmp_path, LONG)
    older(tmp_path)
    again = resolve_settings_in([tmp_path], LONG, "cuda")
    assert multiple(again) == 1
    assert check_workdir(tmp_path, again) == []
    with pytest.raises(ValueError, match=r"capacity_multiple: 1 there, 128 now"):
        check_workdir(tmp_path, with_multiple(LONG, 128))


def test_an_older_plain_run_goes_on(tmp_path):
    plain = train_config("plain")
    claim_workdir(tmp_path, plain)
    older(tmp_path)
    assert check_workdir(tmp_path, resolve_settings_in([tmp_path], plain, "cuda")) == []


def test_imported_weights_that_nobody_trained_on_take_any(tmp_path):
    # A directory that a conversion made leaves it open where the routers are new.
    claim_workdir(tmp_path, LONG)
    (tmp_path / "initial").mkdir()
    assert run_dir.pretrained.present(tmp_path)
    cfg = resolve_settings_in([tmp_path], LONG, "cuda")
    assert multiple(cfg) == 128
    assert check_workdir(tmp_path, cfg) == []


def test_a_branch_takes_that_of_its_source(tmp_path):
    claim_workdir(tmp_path / "source", with_multiple(LONG, 64))
    cfg = resolve_settings_in([tmp_path / "new", tmp_path / "source"], LONG, "cpu")
    assert multiple(cfg) == 64


def test_training_writes_it_down_and_goes_on_elsewhere(tmp_path, monkeypatch):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}: " + " ".join(map(str, range(i, i + 60))))
    model = dataclasses.replace(
        TINY["expert_cycle"], vocab_size=256, num_layers=2, num_recursions=2, router=EXPERT_ROUTER
    )
    cfg = train_config(
        seq_len=64,
        batch_size=8,
        steps=2,
        model=model,
        optim=OptimConfig(warmup_steps=1, decay_steps=1),
        data=DataConfig(sources=(f"text:{tmp_path}/*.txt",), validation_fraction=0.2),
        eval=EvalConfig(interval=None, batches=1, batch_size=8, prompt="", completion_tokens=0),
    )
    monkeypatch.setattr(sharding, "platform", lambda: "cuda")
    fit(cfg, tmp_path / "run")
    assert multiple(read_config(tmp_path / "run")) == 4
    monkeypatch.undo()
    # The same command, where no GPU is: nothing has changed, and weights know how they came about.
    fit(cfg, tmp_path / "run")
    assert multiple(load_run(tmp_path / "run").cfg) == 4


def test_a_plan_rounds_as_its_devices_would(monkeypatch):
    seen = []

    def refuse(cfg, mesh):
        seen.append(multiple(cfg))
        raise aot.OutOfMemory(2, 1, ())

    monkeypatch.setattr(aot, "compile_step", refuse)
    cfg = dataclasses.replace(LONG, batch_size=8, mesh=MeshConfig(data=1, fsdp=8))
    topology = aot.parse_topology("h100:8")
    try_alternatives(cfg, topology, make_plan(cfg, topology), 1)
    assert set(seen) == {128}


def test_the_setting_is_checked():
    router = RouterConfig(kind="expert", capacity_multiple=0)
    with pytest.raises(ValueError, match=r"router\.capacity_multiple=0: must be greater than 0"):
        router.validate("router", 3)
    assert TINY["expert"].router.capacity_multiple is None
