"""Checkpoints: exact restore, placement, damage and fallback, retention, failures to write."""

import errno
import json
import logging
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from support.patience import PATIENCE

from mor_jax.checkpoint import checkpointer, manifest
from mor_jax.checkpoint.checkpointer import Checkpointer, DiskFull, WriteFailed
from mor_jax.config import CheckpointConfig

CFG = CheckpointConfig(max_to_keep=2)
CONFIG = {"model": {"hidden_size": 8, "router": {"capacity": [1.0, 0.5]}}}


@pytest.fixture
def state():
    key = jax.random.key(0)
    params = {
        "embed": {"weight": jax.random.normal(key, (16, 8))},
        "norm": {"scale": jnp.ones(8, jnp.bfloat16)},
    }
    moments = jax.tree.map(lambda p: p.astype(jnp.float32) * 1e-30, params)
    return {
        "params": params,
        "opt_state": {"count": jnp.int32(7), "mu": moments, "nu": moments},
        "step": jnp.int32(7),
        "skipped": jnp.int32(1),
    }


@pytest.fixture
def store(tmp_path):
    with Checkpointer(tmp_path, CFG) as store:
        yield store


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def save(store, state, *steps):
    for step in steps:
        store.save(step, state, step * 10, CONFIG, {"fingerprint": "abc"})
    store.wait()


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def directory(tmp_path, step):
    return tmp_path / "checkpoints" / f"{step:08d}"


def largest_file(path):
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_restores_bits_dtypes_position_and_configuration(store, state):
    state["params"]["embed"]["weight"] = jnp.full((16, 8), jnp.nan).at[0].set(-0.0)
    save(store, state, 5)
    restored = store.restore(abstract(state))
    assert_same(restored.state, state)
    assert (restored.step, restored.position, restored.config) == (5, 50, CONFIG)
    assert restored.extra == {"fingerprint": "abc"}


def test_a_new_process_finds_the_newest(store, state, tmp_path):
    save(store, state, 5, 10)
    with Checkpointer(tmp_path, CFG) as again:
        assert again.latest_valid() == 10
        assert again.restore(abstract(state), step=5).position == 50


def test_reads_without_this_project(store, state, tmp_path):
    save(store, state, 5)
    tree = ocp.load(directory(tmp_path, 5) / "arrays")
    assert type(tree) is dict and type(tree["opt_state"]["mu"]["embed"]) is dict
    np.testing.assert_array_equal(
        tree["params"]["embed"]["weight"], state["params"]["embed"]["weight"]
    )
    manifest = json.loads((directory(tmp_path, 5) / "manifest.json").read_text())
    assert manifest["parameters"] == 16 * 8 + 8
    assert manifest["arrays"]["params.norm.scale"] == "bfloat16[8]"


def test_arrays_may_be_donated_while_they_are_written(store):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": {"w": jnp.full((512, 1024), 3.0)}}
    shape = abstract(state)
    store.save(1, state, 0, CONFIG)
    for _ in range(5):
        state = advance(state)
    jax.block_until_ready(state)
    store.wait()
    assert np.all(np.asarray(store.restore(shape).state["params"]["w"]) == 3)


def test_restores_to_another_number_of_devices(store):
    def over(count):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), "x")
        return jax.NamedSharding(mesh, jax.P("x"))

    sharded = {"params": {"w": jax.device_put(jnp.arange(64.0).reshape(16, 4), over(8))}}
    save(store, sharded, 5)
    for count in (1, 2, 4):
        got = store.restore(abstract(sharded, over(count))).state
        assert_same(got, sharded)
        assert got["params"]["w"].sharding == over(count)


def test_parameters_are_read_without_the_rest_from_any_number_of_devices(store, state):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    over = jax.device_put(state["params"], jax.NamedSharding(mesh, jax.P("x")))
    save(store, {**state, "params": over}, 5)
    assert_same(store.parameters(abstract(state["params"]), 5), state["params"])
    some = store.parameters({"norm": abstract(state["params"]["norm"])}, 5)
    assert_same(some, {"norm": state["params"]["norm"]})
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(some))
    half = jax.NamedSharding(jax.sharding.Mesh(mesh.devices[:4], "x"), jax.P(None, "x"))
    embed = store.parameters({"embed": abstract(state["params"]["embed"], half)}, 5)["embed"]
    assert_same(embed, state["params"]["embed"])
    assert embed["weight"].sharding == half


def test_parameters_of_another_model_are_listed(store, state):
    save(store, state, 5)
    wanted = abstract({"embed": {"weight": jnp.zeros((16, 4))}, "head": {"weight": jnp.zeros(3)}})
    message = r"(?s)embed.weight: float32\[16, 8\] in .*, float32\[16, 4\].*head.weight: absent in"
    with pytest.raises(ValueError, match=message):
        store.parameters(wanted, 5)


def test_facts_are_those_of_a_checked_checkpoint(store, state, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        store.facts()
    save(store, state, 5, 10)
    flip(directory(tmp_path, 10))
    assert (store.facts()["step"], store.facts()["config"]) == (5, CONFIG)
    with pytest.raises(ValueError, match=r"does not match its CRC-32.*Complete steps"):
        store.facts(10)


def test_without_any_checkpoint_there_is_none(store, state, tmp_path):
    assert store.latest_valid() is None
    with pytest.raises(ValueError, match=f"{tmp_path}.*holds no checkpoint"):
        store.restore(abstract(state))


def truncate(path):
    file = largest_file(path / "arrays")
    file.write_bytes(file.read_bytes()[:-1])


def flip(path):
    file = largest_file(path / "arrays")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def remove_file(path):
    (path / "arrays" / "commit_success.txt").unlink()


def remove_manifest(path):
    (path / "manifest.json").unlink()


def cut_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text()[:100])


def empty_file(path):
    largest_file(path / "arrays").write_bytes(b"")


def remove_arrays(path):
    shutil.rmtree(path / "arrays")


def remove_everything(path):
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def edit_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"position": 100', '"position": 101'))


DAMAGES = [
    truncate,
    flip,
    empty_file,
    remove_file,
    remove_arrays,
    remove_everything,
    remove_manifest,
    cut_manifest,
    edit_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_falls_back_aloud_to_an_older_step(store, state, tmp_path, caplog, damage):
    save(store, state, 5, 10)
    damage(directory(tmp_path, 10))
    restored = store.restore(abstract(state))
    assert (restored.step, restored.position) == (5, 50)
    assert_same(restored.state, state)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "DAMAGED" in record.message and str(directory(tmp_path, 10)) in record.message


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_only_damaged_checkpoints_are_an_error(store, state, tmp_path, damage):
    save(store, state, 10)
    damage(directory(tmp_path, 10))
    with pytest.raises(ValueError, match=f"{tmp_path}.*every checkpoint is damaged.*start the run"):
        store.latest_valid()
    with pytest.raises(ValueError, match=r"00000010: .*(missing|bytes|read|changed|CRC)"):
        store.restore(abstract(state), step=10)


def test_a_killed_save_is_neither_used_nor_called_damaged(store, state, tmp_path, caplog):
    save(store, state, 5)
    killed = directory(tmp_path, 10)
    killed.mkdir()
    (killed / "incomplete").touch()
    assert store.latest_valid() == 5
    assert not caplog.records
    save(store, state, 15)
    assert store.latest_valid() == 15
    assert not killed.exists()


def test_a_damaged_step_is_written_anew(store, state, tmp_path):
    save(store, state, 5, 10)
    flip(directory(tmp_path, 10))
    with Checkpointer(tmp_path, CFG) as again:
        assert again.restore(abstract(state)).step == 5
        save(again, state, 10)
        assert again.latest_valid() == 10


def test_what_is_newer_than_the_run_goes(store, state, tmp_path):
    save(store, state, 5, 10)
    with Checkpointer(tmp_path, CFG) as again:
        again.restore(abstract(state), step=5)
        save(again, state, 7)
        assert again.latest_valid() == 7


def test_keeps_the_newest_and_every_hundredth(tmp_path, state):
    cfg = CheckpointConfig(max_to_keep=2, keep_period=100)
    with Checkpointer(tmp_path, cfg) as store:
        save(store, state, 50, 100, 150, 200, 250, 300)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["00000100", "00000200", "00000250", "00000300"]


def test_the_step_just_saved_or_restored_is_not_written_again(store, state, tmp_path):
    save(store, state, 5)
    written = (directory(tmp_path, 5) / "manifest.json").stat().st_mtime_ns
    save(store, state, 5)
    with Checkpointer(tmp_path, CFG) as again:
        again.restore(abstract(state))
        save(again, state, 5)
    assert (directory(tmp_path, 5) / "manifest.json").stat().st_mtime_ns == written


def test_another_model_is_refused_with_every_difference(store, state):
    save(store, state, 5)
    other = abstract(state)
    other["params"]["embed"]["weight"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    other["params"]["head"] = {"weight": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    message = (
        r"(?s)holds 136 parameters, the model has 76.*"
        r"params\.embed\.weight: float32\[16, 8\] in the checkpoint, float32\[16, 4\] in the model"
        r".*params\.head\.weight: absent in the checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        store.restore(other)


def test_other_data_is_refused(store, state):
    save(store, state, 5)
    manifest.check_data(store.facts(), "abc")
    with pytest.raises(ValueError, match=r"fingerprint abc then, xyz now.*position 50"):
        manifest.check_data(store.facts(), "xyz")


class Failing:
    """Stands for a save whose background part fails."""

    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"),
]


@pytest.mark.parametrize("error", FULL, ids=["system", "quota", "storage"])
@pytest.mark.parametrize("background", [True, False], ids=["background", "start"])
def test_a_full_disk_is_explained_and_harms_nothing(
    store, state, tmp_path, monkeypatch, error, background
):
    save(store, state, 5)

    def writer(path, tree):
        if not background:
            raise error
        return Failing(error)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save_async", writer)
        message = rf"{tmp_path}.*010: writing failed: no space left.*step 5, is intact.*keep"
        with pytest.raises(DiskFull, match=message):
            save(store, state, 10)
    assert not directory(tmp_path, 10).exists()
    assert_same(store.restore(abstract(state)).state, state)


def test_a_file_that_the_system_does_not_let_grow_is_an_error_that_harms_nothing(
    store, state, tmp_path
):
    save(store, state, 5)
    large = {"params": {"w": jax.random.normal(jax.random.key(0), (512, 1024))}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"010: writing failed: no space.*2\.0 MiB to write"):
            save(store, large, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not directory(tmp_path, 10).exists()
    assert_same(store.restore(abstract(state)).state, state)
    save(store, large, 15)
    assert_same(store.restore(abstract(large), step=15).state, large)


def test_a_save_that_hangs_is_an_error(store, state, monkeypatch):
    save(store, state, 5)
    end = threading.Event()

    class Hanging:
        def result(self):
            assert end.wait(PATIENCE)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save_async", lambda *_: Hanging())
        patch.setattr(checkpointer, "HUNG", 0.1)
        store.save(10, state, 100, CONFIG)
        with pytest.raises(WriteFailed, match="010: writing failed: not done after 0 s"):
            store.wait()
        end.set()


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_fifty_saves_leave_the_memory_of_the_host_as_it_was(tmp_path):
    # 4 MiB a save: held back even once in four saves, they would be seen.
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}}
    with Checkpointer(tmp_path, CFG) as store:
        save(store, state, *range(1, 11))
        before = resident()
        save(store, state, *range(11, 61))
    assert resident() - before < 48 * 2**20


def test_a_failure_in_the_background_is_raised_once_and_saving_goes_on(store, state, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save_async", lambda *_: Failing(OSError("wire cut")))
        store.save(5, state, 50, CONFIG)
        with pytest.raises(RuntimeError, match=r"failed: OSError: wire cut. There is no earlier"):
            store.save(10, state, 100, CONFIG)
    save(store, state, 10)
    assert store.latest_valid() == 10
