"""Several real processes train as one does: the same losses, the same data, whoever began the run.

Over loopback, with four simulated devices each. Processes without a model: test_hosts.py.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from support.fit_worker import record_rows
from support.patience import PATIENCE
from support.patience import until as in_time
from support.processes import ROOT, Process, until
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax import data
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.run_dir import claim_workdir
from mor_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, MeshConfig
from mor_jax.data.streams.packing import PackedSequences
from mor_jax.distributed import initialize
from mor_jax.distributed.data_shard import rank_of
from mor_jax.models.params import abstract_params
from mor_jax.observability import event_log
from mor_jax.observability.metrics import read
from mor_jax.runtime import exit_codes
from mor_jax.training.trainer import fit

STEPS, ROWS = 4, 8

# name -> model, mesh. Between them every family, every mesh axis, and an axis `tensor` that runs
# over both processes, so that these hold and read the same rows. Few layers: compiling takes the
# time.
RUNS = {
    "expert": (
        dataclasses.replace(TINY["expert_cycle"], num_layers=2, num_recursions=2),
        MeshConfig(data=1, fsdp=8),
    ),
    "token": (
        dataclasses.replace(TINY["token_cycle"], num_layers=2, num_recursions=2),
        MeshConfig(slice=2, data=1, fsdp=2, tensor=2),
    ),
    "plain": (
        dataclasses.replace(TINY["plain"], num_layers=1, num_heads=8, num_kv_heads=8),
        MeshConfig(data=1, tensor=8),
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty short texts."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(20)))
    return DataConfig(sources=(f"text:{folder}/*.txt",), validation_fraction=0.2, prefetch=0)


def config(name, corpus, **changes):
    """Four steps of eight rows of 16 bytes, everything logged, every second step saved."""
    model, mesh = RUNS[name]
    return train_config(
        model=dataclasses.replace(model, vocab_size=256),
        mesh=mesh,
        steps=STEPS,
        batch_size=ROWS,
        data=corpus,
        eval=EvalConfig(
            interval=None,
            batches=1,
            batch_size=ROWS,
            prompt="Text",
            completion_tokens=2 if name == "expert" else 0,
        ),
        log=LogConfig(interval=1),
        checkpoint=CheckpointConfig(interval=2, max_to_keep=5),
        **changes,
    )


def import_weights(name, corpus, workdir):
    """What a run of this name starts from: both runs of "token" from the same imported weights."""
    if name == "token":
        cfg = config(name, corpus)
        claim_workdir(workdir, cfg)
        params = from_arrays(dict(flatten(random_params(cfg.model))))
        pretrained.write(workdir, cfg.model, params, {"from": "a test"})


def losses(workdir):
    """Training losses by step, then the last evaluation."""
    records = read(Path(workdir) / "metrics.jsonl")
    trained = {record["step"]: record["loss"] for record in records if "loss" in record}
    return trained | {"eval": records[-1]["eval/loss_causal"]}


def same(one, other):
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


def taken_back(workdir, target):
    """A copy of a finished run, as it was after step 2."""
    shutil.copytree(workdir, target)
    shutil.rmtree(target / "checkpoints" / f"{STEPS:08d}")
    return target


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Workdirs of all runs, by one process with eight devices; the rows that each read."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSequences, "__getitem__", PackedSequences.__getitem__)
        rows = record_rows()
        for name in RUNS:
            rows.clear()
            import_weights(name, corpus, folder / name)
            fit(config(name, corpus), folder / name)
            (folder / f"{name}.rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def together(corpus, alone, tmp_path_factory):
    """Workdirs of the same runs by two processes, and of one that goes on with a run of `alone`."""
    folder = tmp_path_factory.mktemp("together")
    taken_back(alone / "expert", folder / "continued")
    names = {name: name for name in RUNS} | {"continued": "expert"}
    for name in RUNS:
        import_weights(name, corpus, folder / name)
    runs = [[str(folder / own), config(name, corpus).to_dict()] for own, name in names.items()]
    (folder / "runs.json").write_text(json.dumps(runs))
    port = str(initialize.free_port())
    arguments = ["tests/support/fit_worker.py", str(folder / "runs.json"), port, "2"]
    started = [
        Process([*arguments, str(i)], folder / f"output{i}", JAX_NUM_CPU_DEVICES="4")
        for i in range(2)
    ]
    try:
        codes = [process.code() for process in started]
        assert codes == [0, 0], "\n".join(process.output for process in started)
    finally:
        for process in started:
            process.end()
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_losses_of_one(name, alone, together):
    same(losses(together / name), losses(alone / name))


def test_two_processes_start_from_imported_weights(corpus, together):
    (fresh,) = [
        e for e in event_log.read(together / "token" / "events.jsonl") if e["event"] == "fresh"
    ]
    assert fresh["weights"] == "imported weights of a test"
    assert (together / "output0").read_text().count("starts from imported weights") == 1
    assert "starts from" not in (together / "output1").read_text()


@pytest.mark.parametrize("name", ["expert", "token"])
def test_parameters_that_two_processes_saved_are_read_on_one_device(name, corpus, together):
    cfg = config(name, corpus)
    with Checkpointer(together / name, cfg.checkpoint) as checkpoints:
        params = checkpoints.parameters(abstract_params(cfg.model), STEPS)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(params))


def test_process_0_draws_and_completes(together):
    assert "completion of 'Text'" in (together / "output0").read_text()
    assert "completion of" not in (together / "output1").read_text()
    assert (together / "expert" / "depth.png").exists()


def test_two_processes_go_on_with_a_run_of_one(alone, together):
    continued = losses(together / "continued")
    same(continued, losses(alone / "expert"))


def test_one_process_goes_on_with_a_run_of_two(alone, together, corpus, tmp_path):
    workdir = taken_back(together / "expert", tmp_path / "run")
    fit(config("expert", corpus), workdir)
    same(losses(workdir), losses(alone / "expert"))


def rows_of(file):
    """Rows read of the training split, which is the larger one, and of the other."""
    found = [tuple(pair) for pair in json.loads(file.read_text())]
    largest = max(length for length, _ in found)
    return (
        [row for length, row in found if length == largest],
        [row for length, row in found if length != largest],
    )


@pytest.mark.parametrize("name", ["expert", "token"])
def test_each_process_reads_its_half_of_the_rows(name, alone, together):
    trained, evaluated = rows_of(alone / f"{name}.rows.json")
    parts = [rows_of(together / f"{name}.rows.{i}.json") for i in range(2)]
    for kind, whole in enumerate((trained, evaluated)):
        halves = [part[kind] for part in parts]
        assert not set(halves[0]) & set(halves[1])
        assert sorted(halves[0] + halves[1]) == sorted(whole)
        assert len(halves[0]) == len(halves[1])


def test_processes_that_hold_the_same_rows_read_them_both(alone, together):
    one = rows_of(alone / "plain.rows.json")
    assert [rows_of(together / f"plain.rows.{i}.json") for i in range(2)] == [one, one]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_hosts(hosts, corpus):
    tokenizer, global_rows = data.load_tokenizer("bytes"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSequences, "__getitem__", PackedSequences.__getitem__)
        read_rows = record_rows()
        for host in range(hosts):
            layout = data.Layout(length=16, batch_size=ROWS, host=host, hosts=hosts)
            batches = data.train_batches(corpus, tokenizer, layout, seed=0)
            read_rows.clear()
            global_rows.append(np.stack([next(batches).tokens for _ in range(3)]))
            assert len(read_rows) == 3 * ROWS // hosts
            batches.close()
    whole = data.Layout(length=16, batch_size=ROWS)
    batches = data.train_batches(corpus, tokenizer, whole, seed=0)
    expected = np.stack([next(batches).tokens for _ in range(3)])
    np.testing.assert_array_equal(np.concatenate(global_rows, axis=1), expected)
    batches.close()


@pytest.mark.parametrize(
    ("rows", "tensor", "processes", "expected"),
    [
        (8, 1, 2, [(0, 2), (1, 2)]),
        (4, 2, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (2, 4, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (1, 8, 4, [(0, 1)] * 4),
    ],
)
def test_readers_are_those_that_hold_rows_of_their_own(rows, tensor, processes, expected):
    holders = np.repeat(np.arange(processes), rows * tensor // processes).reshape(rows, tensor)
    assert [rank_of(i, holders) for i in range(processes)] == expected


def test_a_tensor_axis_that_straddles_processes_is_refused():
    # Four devices a process, six a row: process 1 has parts of both rows.
    holders = np.repeat(np.arange(3), 4).reshape(2, 6)
    with pytest.raises(
        ValueError, match=r"mesh\.tensor=6: .*split over several processes.*multiple"
    ):
        rank_of(0, holders)


TIMEOUT = 15

# A run of launch/train.py that lasts until it is ended.
ENDLESS = [
    "--config=configs/mor.py",
    "--config.steps=100000",
    "--config.optim.warmup_steps=1",
    "--config.optim.decay_steps=1",
    "--config.batch_size=8",
    "--config.seq_len=16",
    "--config.loss_chunk_size=None",
    "--config.model.hidden_size=32",
    "--config.model.num_heads=4",
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=8",
    "--config.model.intermediate_size=48",
    "--config.model.num_layers=5",
    "--config.model.dtype=float32",
    "--config.model.max_seq_len=64",
    "--config.eval.interval=None",
    "--config.eval.batches=1",
    "--config.eval.completion_tokens=0",
    "--config.log.interval=1",
    "--config.checkpoint.interval=5",
    # Time enough for whoever lives to beat on a busy machine.
    f"--config.hosts.heartbeat_timeout={TIMEOUT}",
    "--config.compilation_cache=False",
]


def logged(workdir):
    """Steps in metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return [record["step"] for record in read(file)] if file.exists() else []


def saved(workdir):
    """Complete checkpoints."""
    found = (workdir / "checkpoints").glob("0*/manifest.json")
    return sorted(int(path.parent.name) for path in found)


def endless(workdir, corpus):
    return [*ENDLESS, f"--config.data.sources={corpus.sources!r}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory):
    """A run of two processes, one of them killed: workdir, pid, exit code and words of the
    other."""
    folder = tmp_path_factory.mktemp("killed")
    workdir, port = folder / "run", initialize.free_port()
    join = ["--distributed=manual", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    started = [
        Process(
            ["launch/train.py", *endless(workdir, corpus), *join, f"--process={i}"],
            folder / f"output{i}",
            JAX_NUM_CPU_DEVICES="4",
        )
        for i in range(2)
    ]
    try:
        until(lambda: saved(workdir), started)
        started[1].send(signal.SIGKILL)
        code = started[0].code()
        yield workdir, started[1].pid, code, started[0].output
    finally:
        for process in started:
            process.end()


def test_a_killed_process_is_named(killed):
    _, pid, code, output = killed
    assert code == exit_codes.HOST_LOST, output
    assert "host lost: process 1 of 2" in output and f"pid {pid})" in output
    silent = int(re.search(r"sent no heartbeat for (\d+) s", output)[1])
    # A third of the time at most is added at once.
    assert TIMEOUT <= silent <= TIMEOUT + TIMEOUT // 3


def test_the_relaunch_goes_on_and_stops_as_one(killed, corpus, tmp_path):
    """Through launch/local_multiprocess.sh; SIGTERM to one process ends both after a step."""
    workdir, before = killed[0], killed[0] / "metrics.jsonl"
    newest, seen = saved(workdir)[-1], len(logged(workdir))
    assert seen >= newest
    output = tmp_path / "output"
    command = ["launch/local_multiprocess.sh", "2", "--devices=4", "--", *endless(workdir, corpus)]
    with output.open("w") as file, script(command, file) as launcher:

        def further():
            assert launcher.poll() is None, output.read_text()
            return max(logged(workdir), default=0) >= seen + 3

        in_time(further)
        os.kill(json.loads((workdir / "hosts" / "1.json").read_text())["pid"], signal.SIGTERM)
        assert launcher.wait(PATIENCE) == exit_codes.STOPPED, output.read_text()
    told = [line for line in output.read_text().splitlines() if "stopped after step" in line]
    assert len(told) == 2, output.read_text()
    steps = {line.split("stopped after step ")[1].split(",")[0] for line in told}
    assert len(steps) == 1
    assert saved(workdir)[-1] == int(steps.pop())
    # Steps after the checkpoint were run again, each step is there once.
    assert logged(workdir) == list(range(1, saved(workdir)[-1] + 1)), before


@contextlib.contextmanager
def script(command, file):
    """Runs a launch script, and ends it and what it started whatever happens."""
    launcher = subprocess.Popen(
        command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield launcher
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
