"""Running a study: order, retries, stops, results that stay; what is handed to clusters."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.patience import PATIENCE, until
from support.small_study import CONFIGS, SMALL

from mor_jax.scaling.runs.cluster import Cluster, submit
from mor_jax.scaling.runs.collect import add, directory, progress
from mor_jax.scaling.runs.commands import families, selected
from mor_jax.scaling.runs.local import LocalOptions, StudyStopped, run_local
from mor_jax.scaling.runs.points import RESULTS, Point, read_points
from mor_jax.scaling.study.manifest import read, write
from mor_jax.scaling.study.plan import make_plan

ROOT = CONFIGS.parent
STAND_IN = Path(__file__).parents[2] / "support" / "stand_in.py"


@pytest.fixture
def study(tmp_path):
    """Two architectures, three sizes, two budgets: twelve runs in six families."""
    asked = dataclasses.replace(SMALL, architectures=("plain", "mor-2"))
    write(tmp_path / "study", make_plan(asked, CONFIGS))
    (tmp_path / "study" / "orders").mkdir()
    return tmp_path / "study"


def run(study, **how):
    """Runs it; returns the runs that failed and the events as `kind name`."""
    events = []
    how = LocalOptions(train=STAND_IN, **({"jobs": 2} | how))
    failed = run_local(study, read(study), how, lambda e: events.append((e.kind, e.run.name)))
    return failed, events


def on_slurm(study, flags, **changes):
    return submit(study, read(study), Cluster(where="slurm", root=ROOT, flags=flags, **changes))


def order(study, name, text):
    (study / "orders" / name).write_text(text)


def test_runs_all_in_order_and_once(study):
    failed, events = run(study)
    manifest = read(study)
    started = [name for kind, name in events if kind == "start"]
    assert not failed and sorted(started) == sorted(one.name for one in manifest.runs)
    for one in manifest.runs:
        if one.source:
            assert events.index(("done", one.source)) < events.index(("start", one.name))
    assert len(read_points(study)) == 12
    assert run(study) == ({}, [])
    # Directories may go, results stay.
    for one in manifest.runs:
        (directory(study, one) / "metrics.jsonl").unlink()
    assert run(study) == ({}, [])


def test_a_failure_is_tried_again_then_left_with_those_that_need_it(study):
    order(study, "plain-w16-1e12-s0", "fail")
    order(study, "mor-2-w32-1e12-s0", "fail always")
    failed, events = run(study, retries=1)
    assert ("retry", "plain-w16-1e12-s0") in events and ("done", "plain-w16-1e12-s0") in events
    assert set(failed) == {"mor-2-w32-1e12-s0", "mor-2-w32-4e12-s0"}
    assert "the disk is full" in failed["mor-2-w32-1e12-s0"]
    assert ("blocked", "mor-2-w32-4e12-s0") in events
    assert len(read_points(study)) == 10
    (study / "orders" / "mor-2-w32-1e12-s0").unlink()
    failed, events = run(study)
    assert not failed and len(events) == 4


def test_a_result_that_is_no_number_is_a_failure(study):
    order(study, "plain-w16-4e12-s0", "nan")
    failed, _ = run(study, retries=0)
    assert list(failed) == ["plain-w16-4e12-s0"]
    assert "loss_causal=nan: must be a positive finite number" in failed["plain-w16-4e12-s0"]
    states = {each.run.name: each.state for each in progress(study, read(study))}
    assert states.pop("plain-w16-4e12-s0") == "failed" and set(states.values()) == {"done"}


def test_only_a_part_is_run_with_what_it_needs(study):
    _, events = run(study, only=("mor-2", "w32"))
    assert {name for _, name in events} == {"mor-2-w32-1e12-s0", "mor-2-w32-4e12-s0"}
    manifest = read(study)
    assert [r.name for r in selected(manifest, ["plain-w64-4e12-s0"])] == [
        "plain-w64-1e12-s0",
        "plain-w64-4e12-s0",
    ]
    assert [len(family) for family in families(manifest.runs)] == [2] * 6
    with pytest.raises(ValueError, match="only='w33': not a run"):
        run(study, only=("w33",))


def test_a_signal_ends_the_trainings_and_a_second_runner_is_refused(study):
    order(study, "plain-w16-1e12-s0", "sleep")
    second = []

    def tell(event):
        if event.kind == "start" and event.run.name == "plain-w16-1e12-s0":
            with pytest.raises(ValueError, match="is running it"):
                run(study)
            second.append(event.run)
            log = study / "logs" / f"{event.run.name}.log"
            until(lambda: "asleep" in log.read_text())
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StudyStopped):
        run_local(study, read(study), LocalOptions(train=STAND_IN), tell)
    # It was ended in its sleep: after that it would have left results.
    [asleep] = second
    assert not (directory(study, asleep) / "metrics.jsonl").exists()
    (study / "orders" / "plain-w16-1e12-s0").unlink()
    assert run(study)[0] == {} and len(read_points(study)) == 12


def test_a_directory_of_another_run_is_refused(study):
    run(study)
    (study / RESULTS).unlink()
    config = directory(study, read(study).runs[0]) / "config.json"
    values = json.loads(config.read_text())
    values["optim"]["lr"] = 1.0
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"not the planned one.*optim\.lr"):
        run(study)


def test_results_of_another_study_are_refused(study):
    one = read(study).runs[0]
    names = {field.name for field in dataclasses.fields(Point)} - {"run"}
    values = {name: getattr(one, name) for name in names if hasattr(one, name)}
    point = Point(run=one.name, loss_causal=1.5, **values)
    add(study, [point])
    assert progress(study, read(study))[0].state == "done"
    for other in ({"run": "plain-w8-1e12-s0"}, {"tokens": 7}):
        (study / RESULTS).unlink()
        add(study, [dataclasses.replace(point, **other)])
        with pytest.raises(ValueError, match=r"runs that are not in this study|of another study"):
            progress(study, read(study))
    (study / RESULTS).write_text("[1]\n")
    with pytest.raises(ValueError, match="must be an object"):
        progress(study, read(study))


def test_a_training_that_outlived_its_runner_is_waited_for(study):
    first = directory(study, read(study).runs[0])
    first.mkdir(parents=True)
    events = []
    with (first / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def tell(event):
            events.append((event.kind, event.run.name))
            if event.kind == "waiting":
                fcntl.flock(lock, fcntl.LOCK_UN)

        how = LocalOptions(train=STAND_IN, only=("plain", "w16"), retries=0)
        failed = run_local(study, read(study), how, tell)
    assert not failed and [kind for kind, name in events if name == first.name] == [
        "waiting",
        "start",
        "done",
    ]


def test_settings_that_decide_on_results_belong_to_the_plan(study):
    for word in (
        "optim.lr=1",
        "steps=5",
        "eval.batches=1",
        "checkpoint.keep_steps=()",
        "nothing=1",
    ):
        with pytest.raises(ValueError, match="belongs to the plan"):
            run(study, settings=(f"--config.{word}",))
    assert run(study, only=("plain", "w16"), settings=("--config.log.interval=1",))[0] == {}


def test_jobs_have_to_fit_the_machine(study):
    with pytest.raises(ValueError, match="jobs=0"):
        run(study, jobs=0)
    with pytest.raises(ValueError, match=r"jobs=3: must be in 1 \.\. 2"):
        run(study, jobs=3, gpus=("0", "1"))


def test_slurm_gets_one_array_of_what_is_left(study):
    run(study, only=("plain", "w16"))
    said = on_slurm(study, ["--partition=gpu", "--dry_run"], settings=["--config.mesh.fsdp=2"])
    assert "--array=0-4" in said[0] and "--partition=gpu" in said[0]
    lines = (study / "slurm" / "0" / "0.runs").read_text().splitlines()
    assert [line.split("--workdir=")[1].split()[0] for line in lines] == [
        f"{study}/runs/mor-2-w16-{budget}-s0" for budget in ("1e12", "4e12")
    ]
    step = read(study).run("mor-2-w16-4e12-s0").source_step
    branch = f"--branch={study}/runs/mor-2-w16-1e12-s0@{step}"
    assert lines[1].endswith(f"{branch} --config.mesh.fsdp=2")
    # What was submitted before may still be waiting for its list.
    on_slurm(study, ["--dry_run"])
    assert (study / "slurm" / "0" / "0.runs").read_text().splitlines() == lines
    with pytest.raises(ValueError, match=r"submit\.sh ended with exit code 2.*--nodes=x"):
        on_slurm(study, ["--nodes=x"])


def test_gke_gets_a_workload_a_family(study):
    flags = ["--cluster=c", "--tpu_type=v5litepod-8", "--image=us/i:t", "--dry_run"]
    to = Cluster(where="gke", root=ROOT, flags=flags, only=("plain",))
    said = submit(study, read(study), to)
    assert len(said) == 3 and len({line.split("--workload=")[1].split()[0] for line in said}) == 3
    assert all(line.count("launch/train.py") == 2 and " && " in line for line in said)


def test_an_array_task_runs_its_trainings_in_order_until_one_fails(tmp_path):
    (tmp_path / "3.runs").write_text("--workdir=a --config=x\n--workdir=b --config=x\n")
    for name, text in (("srun", 'echo "$@"; [[ "$*" != *=b* ]]'), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_JOB_NODELIST": "n", "SLURM_ARRAY_TASK_ID": "3"}
    job = ["launch/slurm/train.sbatch", f"--runs={tmp_path}"]
    done = subprocess.run(job, cwd=ROOT, env=env, text=True, capture_output=True)
    ran = [line for line in done.stdout.splitlines() if "--workdir" in line]
    assert [line.split("--workdir=")[1].split()[0] for line in ran] == ["a", "b"]
    assert done.returncode == 1


def test_the_command_plans_trains_fits_and_reports(tmp_path):
    """The real thing, as small as it can be."""
    study, text = str(tmp_path / "tiny"), tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(30)))
    settings = {
        "batch_size": 2,
        "seq_len": 16,
        "loss_chunk_size": None,
        "checkpoint.interval": None,
    }
    settings |= {"eval.interval": None, "eval.batches": 1, "eval.batch_size": 2}
    settings |= {"eval.completion_tokens": 0, "data.sources": (f"text:{text}/*.txt",)}
    grid = ["--architectures=plain", "--sizes=w8,w16,w24", "--budgets=2e7", "--layers=1"]
    grid += ["--head_dim=8", "--min_steps=2", "--tokens_per_parameter=1"]
    grid += [f"--config.{name}={value}" for name, value in settings.items()]

    def command(name, *words):
        line = [sys.executable, "launch/isoflop.py", name, f"--study={study}", *words]
        done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert f"planned: {study}/manifest.json" in command("plan", *grid)
    assert "0 of 3 runs done" in command("status")
    assert "3 of 3 runs done" in command("run", "--jobs=2")
    assert {point.size for point in read_points(study)} == {"w8", "w16", "w24"}
    assert "plain" in command("fit")
    page = next(Path(line) for line in command("report").splitlines() if line.endswith(".html"))
    assert "data:image/png" in page.read_text() and "plain-w16-2e07-s0" in page.read_text()
