"""Signals: noted, obeyed at once where there is nothing to save, also inside calls that block."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import psutil
import pytest
from support.patience import PATIENCE, until

from mor_jax.config import MeshConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.distributed.stop_consensus import StopConsensus
from mor_jax.runtime import exit_codes
from mor_jax.runtime.preemption import KINDS, ImmediateExit, Signals

ROOT = Path(__file__).parents[2]

# Hashing leaves the interpreter, as compiling does: no handler written in Python runs until it is
# through, which here takes minutes.
BLOCKED = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from mor_jax.runtime.preemption import Signals
with Signals() as signals:
    signals.on_exit(lambda reason: print("last word:", reason, flush=True))
    signals.nothing_to_save = sys.argv[2]
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def blocked(nothing_new: str, kind: int, every: float = PATIENCE) -> tuple[int, str]:
    """Exit code and output of a process that is inside a long call when it gets a signal, and gets
    it again after each `every` seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(ROOT), nothing_new],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        # Nothing else is left to compute: it is inside the call once it has computed for a while.
        clock = psutil.Process(process.pid)
        before = clock.cpu_times().user
        until(lambda: clock.cpu_times().user > before + 0.1)
        for _ in range(int(PATIENCE / every)):
            process.send_signal(kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output = process.communicate(timeout=every)[0]
                return process.returncode, output
    finally:
        process.kill()
    raise AssertionError("still running")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_with_nothing_to_save_a_run_leaves_at_once_even_inside_a_compiler(kind):
    code, output = blocked("no step was completed", kind)
    assert code == exit_codes.STOPPED == 75
    word = f"{kind.name}: exited at once, no step was completed"
    assert output == f"last word: {word}\nstopped: {word}. Run the same command again to resume\n"


def test_a_second_signal_leaves_at_once_without_saving():
    # Longer than what counts as one request; when signals arrive is the machine's affair.
    code, output = blocked("", signal.SIGTERM, every=1.5)
    assert code == exit_codes.STOPPED
    assert "SIGTERM: exited at once, without saving" in output


def test_the_same_signal_twice_at_once_and_another_kind_are_one_request():
    with Signals() as signals:
        signals.nothing_to_save = ""
        for kind in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), kind)
        assert signals.caught == "SIGUSR1"


def test_a_signal_is_noted_and_raised_where_the_program_looks():
    before = [signal.getsignal(kind) for kind in KINDS]
    with Signals() as signals:
        with signals:
            signals.nothing_to_save = ""
            os.kill(os.getpid(), signal.SIGTERM)
            assert (signals.number, signals.caught) == (signal.SIGTERM, "SIGTERM")
        # Leaving the inner block leaves the outer one listening.
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(kind) for kind in KINDS] == before
    with Signals() as signals:
        signals.polls = True
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        # Nothing comes up in the middle of other code: the program looks.
        with pytest.raises(ImmediateExit, match="SIGINT: exited at once, no step was completed"):
            signals.check()
        with pytest.raises(ImmediateExit):
            signals.mark_unsaved()


def test_beside_the_main_thread_there_are_no_signals_and_no_errors():
    seen = []

    def work():
        with Signals() as signals:
            seen.append(signals.caught)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [""]


def test_a_single_process_agrees_with_itself_at_once():
    mesh = sharding.make_mesh(MeshConfig())
    agree = StopConsensus(mesh)
    assert [agree(0), agree(15), agree(0)] == [0, 15, 0]


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["8", "2x2x2"])
def test_several_processes_learn_the_largest_number_one_step_late(shape):
    mesh = sharding.make_mesh(MeshConfig(**shape))
    agree = StopConsensus(mesh, several=True)
    with jax.set_mesh(mesh):
        assert [agree(0), agree(15), agree(10), agree(0)] == [0, 0, 15, 10]


LONG = ["--workdir=no/such/run"]
COMMANDS = {
    "train": ["--config=configs/mor.py", "--workdir={tmp}/run"],
    "plan": ["--config=configs/mor.py", "--topology=v5e:2x2"],
    "accounting": [],
    "evaluate": LONG,
    "calibrate": LONG,
    "analyze": ["statistics", *LONG],
    "generate": [*LONG, "--prompt=a"],
    "serve": LONG,
    "isoflop": ["status", "--study={tmp}/study"],
    "prepare_data": ["--source=stdlib", "--output={tmp}/shards"],
}

# Starts a command as Python does, but stops where it first imports what takes long, and there gets
# a signal: until then nothing may have come that could be hurt.
EARLY = """
import os, signal, sys, runpy, time

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("absl", "jax", "numpy", "rich", "ml_collections", "etils"):
            os.kill(os.getpid(), int(os.environ["KIND"]))
            time.sleep(float(os.environ["PATIENCE"]))
        return None

sys.meta_path.insert(0, Heavy())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_ended_while_it_imports(name, tmp_path):
    kind = KINDS[list(COMMANDS).index(name) % len(KINDS)]
    words = [word.format(tmp=tmp_path) for word in COMMANDS[name]]
    done = subprocess.run(
        [sys.executable, "-c", EARLY, f"launch/{name}.py", *words],
        env={**os.environ, "KIND": str(int(kind)), "PATIENCE": str(PATIENCE)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    # A server that is told to end before it serves has done what it was told.
    assert done.returncode == (exit_codes.OK if name == "serve" else exit_codes.STOPPED)
    assert done.stderr.startswith(f"stopped: {kind.name}: exited at once, ")
    assert done.stderr.count("\n") == 1 and "he same command" in done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())
