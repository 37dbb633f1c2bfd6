"""launch/ for many hosts: scripts that shellcheck accepts, dry runs that say what would run, and
processes that are started, signalled and waited for.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.patience import PATIENCE, until

ROOT = Path(__file__).parents[2]
# Beside the interpreter, whether or not its environment is active.
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
SCRIPTS = sorted(
    path
    for path in (ROOT / "launch").rglob("*")
    if path.suffix in (".sh", ".sbatch") and not path.name.startswith(".")
)
# A value with a space and one with a quote have to arrive as they are.
TRAINING = ["--config=configs/mor.py:size=360m", "--workdir=gs://runs/a run", "--config.name=it's"]


def execute(*command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **variables},
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )


def dry_run(script: str, *flags: str) -> str:
    """What it prints; it must not fail or complain."""
    interpreter = [sys.executable] if script.endswith(".py") else []
    done = execute(*interpreter, f"launch/{script}", *flags, "--dry_run", "--", *TRAINING)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def refused(script: str, *command: str) -> str:
    interpreter = [sys.executable] if script.endswith(".py") else []
    done = execute(*interpreter, f"launch/{script}", *command)
    assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
    return done.stderr


def trained(words: list[str]) -> list[str]:
    """Arguments of launch/train.py in a command."""
    return words[words.index("launch/train.py") + 1 :]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_satisfy_shellcheck(path):
    done = execute(SHELLCHECK, "--external-sources", "-P", "SCRIPTDIR", "-P", ROOT, path)
    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!"), path


def test_slurm_dry_run():
    flags = ["--nodes=2", "--gpus_per_node=4", "--partition=gpu", "--grace=300", "--time=2:00:00"]
    lines = dry_run("slurm/submit.sh", *flags).splitlines()
    submit = shlex.split(next(line for line in lines if line.startswith("sbatch ")))
    assert {
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--partition=gpu",
        "--signal=B:USR1@300",
        "--time=2:00:00",
    } <= set(submit)
    assert submit[-len(TRAINING) - 1 :] == [str(ROOT / "launch/slurm/train.sbatch"), *TRAINING]
    step = shlex.split(next(line for line in lines if line.startswith("srun ")))
    assert trained(step) == ["--distributed=auto", *TRAINING]


# Stand-ins for Slurm: srun is the step, which waits for a signal, scontrol says that it was called.
SRUN = """#!/usr/bin/env bash
trap 'echo got USR1; exit 75' USR1
echo "srun $*"
[[ -n "${WAIT:-}" ]] && for i in {1..24000}; do sleep 0.05; done
exit "${CODE:-0}"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*"\n'


@pytest.fixture
def slurm(tmp_path):
    """Environment of a job with stand-ins for Slurm's commands."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"}


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, False),
        (75, 0, True),
        (76, 3, True),
        (77, 0, False),
        (137, 0, True),
        (253, 0, False),
        (76, 50, False),
    ],
)
def test_slurm_job_queues_itself_again(code, restarts, again, slurm):
    job = ("launch/slurm/train.sbatch", *TRAINING)
    done = execute(*job, CODE=str(code), SLURM_RESTART_COUNT=str(restarts), **slurm)
    assert done.returncode == code
    assert ("scontrol requeue 7" in done.stdout) == again
    assert f"--distributed=auto {' '.join(TRAINING)}" in done.stdout


def test_slurm_job_passes_the_signal_on(slurm, tmp_path):
    output = tmp_path / "output"
    with output.open("w") as file:
        job = subprocess.Popen(
            ["launch/slurm/train.sbatch", *TRAINING],
            cwd=ROOT,
            env={**os.environ, **slurm, "WAIT": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        until(lambda: "srun --kill" in output.read_text())
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 75
    assert "got USR1" in output.read_text() and "scontrol requeue 7" in output.read_text()


def test_xpk_dry_run():
    flags = ["--cluster=c", "--workload=mor", "--tpu_type=v5litepod-256", "--slices=2"]
    words = shlex.split(dry_run("gke/xpk.sh", *flags, "--image=pkg.dev/p/mor:1"))
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--num-slices=2",
        "--tpu-type=v5litepod-256",
        "--docker-image=pkg.dev/p/mor:1",
        "--restart-on-exit-codes=75,76",
    } <= set(words)
    inside = next(word for word in words if word.startswith("--command="))
    assert trained(shlex.split(inside.partition("=")[2])) == ["--distributed=auto", *TRAINING]


JOBSET = ["--name=mor", "--image=pkg.dev/p/mor:1", "--accelerator=tpu-v5-lite-podslice"]


def test_jobset_dry_run():
    text = dry_run("gke/jobset.py", *JOBSET, "--topology=16x16", "--slices=2")
    spec = yaml.safe_load(text)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    [part] = spec["replicatedJobs"]
    job = part["template"]["spec"]
    # 256 chips, 4 a host.
    assert (part["replicas"], job["parallelism"], job["completions"]) == (2, 64, 64)
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert {75, 76, 137} <= set(rule["onExitCodes"]["values"])
    assert not {1, 77} & set(rule["onExitCodes"]["values"])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    [container] = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert trained(container["command"]) == ["--distributed=auto", *TRAINING]


def test_jobset_is_applied_without_dry_run(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/usr/bin/env bash\necho "$@"; grep "name: mor"; exit 3\n')
    kubectl.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    flags = [*JOBSET, "--topology=4x4", "--", *TRAINING]
    done = execute(sys.executable, "launch/gke/jobset.py", *flags, PATH=path)
    assert done.returncode == 3 and done.stdout.startswith("apply -f -")
    assert "name: mor" in done.stdout


def test_tpu_vm_dry_runs():
    where = ["--name=pod", "--zone=us-west4-b", "--project=p"]
    create = dry_run("tpu_vm/pod.sh", "create", *where, "--accelerator_type=v6e-256", "--slices=2")
    assert create.split()[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert "--runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=pod" in create
    single = dry_run("tpu_vm/pod.sh", "create", *where, "--accelerator_type=v5p-512", "--spot")
    assert "--runtime-version=v2-alpha-tpuv5 --node-id=pod --spot" in single
    code = ["--repository=https://x/y.git", "--commit=abc"]
    setup = shlex.split(dry_run("tpu_vm/pod.sh", "setup", *where, *code))
    assert {"--worker=all", "--node=all", "--project=p"} <= set(setup)
    assert "git checkout --detach abc" in setup[-1] and "requirements-tpu.txt" in setup[-1]
    run = shlex.split(dry_run("tpu_vm/pod.sh", "run", *where))
    remote = shlex.split(run[-1].partition("=")[2])
    assert remote[:3] == ["cd", "mor_jax", "&&"]
    assert trained(remote) == ["--distributed=auto", *TRAINING]
    assert "pkill -TERM" in dry_run("tpu_vm/pod.sh", "stop", *where)
    assert " delete pod " in dry_run("tpu_vm/pod.sh", "delete", *where)


def test_gpu_ssh_dry_run():
    flags = ["--hosts=a,me@b", "--directory=/shared/a clone", "--port=9000"]
    lines = dry_run("gpu/ssh.sh", *flags).splitlines()
    assert len(lines) == 2
    for i, (line, machine) in enumerate(zip(lines, ("a", "me@b"), strict=True)):
        ssh, host, remote = shlex.split(line)
        assert (ssh, host) == ("ssh", machine)
        words = shlex.split(remote)
        assert words[:2] == ["cd", "/shared/a clone"]
        # Signals go to the process that starts it again, not to one of its starts.
        assert words[2:7] == ["&&", "echo", "$$", ">/tmp/mor_jax-9000.pid", "&&"]
        joins = ["--distributed=manual", "--coordinator=a:9000", "--processes=2", f"--process={i}"]
        assert trained(words) == [*joins, *TRAINING]


@pytest.mark.parametrize(
    ("script", "command", "message"),
    [
        ("slurm/submit.sh", ["--nodes=0", "--", *TRAINING], "--nodes=0: must be a positive number"),
        ("slurm/submit.sh", ["--time=soon", "--", *TRAINING], "--time=soon: must be a time limit"),
        ("slurm/submit.sh", ["--config=x"], "--config=x: is not a flag of this script"),
        ("slurm/submit.sh", ["--", "--config=x"], "nothing like --workdir=DIR after --"),
        ("slurm/submit.sh", ["--setup=/no", "--", *TRAINING], "--setup=/no: cannot be read"),
        ("slurm/submit.sh", ["--", *TRAINING, "--process=0"], "are set by this launcher"),
        ("gke/xpk.sh", ["--", *TRAINING], "--cluster: is missing. Try --cluster=my-cluster"),
        ("gke/jobset.py", [*JOBSET, "--topology=4x4x4", "--", *TRAINING], "has 2 dimensions"),
        ("gke/jobset.py", [*JOBSET, "--topology=1x1", "--", *TRAINING], "must divide the 1 chips"),
        ("gke/jobset.py", [*JOBSET, "--topology=4x4"], "nothing like --config="),
        ("tpu_vm/pod.sh", ["start"], "'start': must be create, setup, run, stop or delete"),
        ("tpu_vm/pod.sh", ["run", "--name=A", "--zone=z"], "--name=A: must be lower case"),
        (
            "tpu_vm/pod.sh",
            ["create", "--name=a", "--zone=z", "--accelerator_type=v9-8"],
            "its runtime is not known here. Add --runtime_version",
        ),
        ("gpu/ssh.sh", ["--hosts=a b", "--directory=/x", "--", *TRAINING], "names with commas"),
        ("local_multiprocess.sh", ["two"], "N=two: must be a number of processes"),
        ("local_multiprocess.sh", ["2", "--devices=0", "--", "x"], "must be a positive number"),
        ("local_multiprocess.sh", ["2", "--config=x"], "is not a flag of this script"),
        ("local_multiprocess.sh", ["2"], "nothing after --"),
        ("again.sh", ["x"], "usage:"),
    ],
)
def test_bad_flags_are_named(script, command, message):
    assert message in refused(script, *command)


# A stand-in for Python: process 1 ends as it is told to, the others wait for a signal.
WORKER = """
import os, pathlib, signal, sys, time

if sys.argv[1] == "-c":
    sys.exit(print(4711))
process = next(word for word in sys.argv if word.startswith("--process="))[-1]


def stop(kind, _):
    # Not by print, which a second signal must not enter while it is at work.
    os.write(1, f"got {signal.Signals(kind).name}\\n".encode())
    os._exit(75)


for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(kind, stop)
print(f"devices {os.environ['JAX_NUM_CPU_DEVICES']}:", *sys.argv[1:], flush=True)
here = pathlib.Path(__file__).parent
(here / f"ready{process}").touch()
if process == "1" and "CODE" in os.environ:
    # Not before the others can tell that they got a signal.
    while len(list(here.glob("ready*"))) < 3:
        time.sleep(0.05)
    sys.exit(int(os.environ["CODE"]))
time.sleep(PATIENCE)
""".replace("PATIENCE", str(PATIENCE))


@pytest.fixture
def launched(tmp_path):
    """Starts local_multiprocess.sh with the stand-in; gives the process and its output file."""
    script, worker = tmp_path / "worker.py", tmp_path / "python"
    script.write_text(WORKER)
    # Not a first line with the interpreter: that may hold no space, the path of a checkout may.
    worker.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    worker.chmod(0o755)
    started = []

    def launch(*flags: str, **variables: str):
        output = tmp_path / "output"
        with output.open("w") as file:
            command = ["launch/local_multiprocess.sh", "3", *flags, "--", *TRAINING]
            environment = {**os.environ, "PYTHON": str(worker), **variables}
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1], output

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# A terminal sends SIGINT to the script and to the processes, and only that.
@pytest.mark.parametrize(
    ("kind", "to_group"),
    [
        (signal.SIGINT, True),
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
        (signal.SIGUSR1, False),
    ],
)
def test_local_processes_are_stopped_by_a_signal(kind, to_group, launched):
    process, output = launched("--devices=4")
    until(lambda: output.read_text().count("devices 4:") == 3)
    (os.killpg if to_group else os.kill)(process.pid, kind)
    assert process.wait(PATIENCE) == 75
    lines = output.read_text().splitlines()
    assert {f"[{i}] got {kind.name}" for i in range(3)} <= set(lines), lines


def test_local_processes_join_by_the_same_port(launched):
    process, output = launched()
    until(lambda: output.read_text().count("devices 1:") == 3)
    process.terminate()
    process.wait(PATIENCE)
    lines = sorted(line for line in output.read_text().splitlines() if "devices" in line)
    for i, line in enumerate(lines):
        join = "--distributed=manual --coordinator=127.0.0.1:4711 --processes=3"
        expected = f"{join} --process={i} {' '.join(TRAINING)}"
        assert line.startswith(f"[{i}] devices 1:") and line.endswith(expected)


def test_a_refused_process_ends_the_others(launched):
    """The exit code is that of the first failure, not of those that were ended because of it."""
    process, output = launched(CODE="2")
    assert process.wait(PATIENCE) == 2
    lines = output.read_text().splitlines()
    assert {"[0] got SIGTERM", "[2] got SIGTERM"} <= set(lines)


@pytest.mark.parametrize(
    ("codes", "result"),
    [
        ("0", 0),
        ("76 0", 0),
        ("137 76 0", 0),
        ("1 0", 1),
        ("75 0", 75),
        # Ended by a signal that asks for it, before the command could listen.
        ("130 0", 75),
        ("138 0", 75),
        ("143 0", 75),
        ("76 76 76 76", 76),
    ],
)
def test_again_repeats_what_was_lost(codes, result, tmp_path):
    command = tmp_path / "command"
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    command.write_text(
        '#!/usr/bin/env bash\ncd "$(dirname "$0")" && code=$(head -n1 codes) && sed -i 1d codes\n'
        'exit "$code"\n'
    )
    command.chmod(0o755)
    done = execute("launch/again.sh", "3", command, MOR_JAX_PAUSE="0")
    assert done.returncode == result


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("state", ["running", "between"])
def test_again_passes_signals_on_and_starts_nothing_after_one(state, kind, tmp_path):
    listens = "trap 'exit 75' TERM USR1; echo ready; while :; do sleep 0.1; done"
    command = {"running": listens, "between": "echo ready; exit 76"}[state]
    process = subprocess.Popen(
        ["launch/again.sh", "3", "bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "MOR_JAX_PAUSE": str(PATIENCE)},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "told").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if state == "between":
            until(lambda: "starting again" in (tmp_path / "told").read_text())
        process.send_signal(kind)
        assert process.wait(PATIENCE) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout.read() == "", "it was started again"


DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_copy_what_exists(path):
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    text = path.read_text()
    steps = re.findall(r"^(FROM|COPY|RUN|USER|ENV|WORKDIR|CMD) (.*)", text, re.MULTILINE)
    assert re.search(r":\d+\.\d+\.\d+", dict(steps)["FROM"]), "the base is pinned"
    copied = [word for step, words in steps if step == "COPY" for word in words.split()[:-1]]
    assert {"mor_jax", "configs", "launch", "requirements.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in kept, name
    [pip] = [words for step, words in steps if step == "RUN" and "pip install" in words]
    required = re.findall(r"-r (\S+)", pip)
    assert pip.split()[-1] == required[-1] and set(required) <= set(copied)
    command = json.loads(dict(steps)["CMD"])
    assert (ROOT / command[1]).exists()


def test_both_dockerfiles_are_there():
    assert [path.name for path in DOCKERFILES] == ["gpu.Dockerfile", "tpu.Dockerfile"]
