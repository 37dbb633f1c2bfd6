"""Who holds a directory where there are no locks."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath
from support.patience import PATIENCE

from mor_jax.checkpoint import run_dir, run_lock
from mor_jax.checkpoint.run_lock import RunLock, RunLocked

ROOT = Path(__file__).parents[2]


def test_a_second_one_is_refused_while_the_first_lives_and_not_after(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "lock"
    with RunLock(file, "process 1 on here", every=0.05):
        # On a machine that is slow enough nobody knows when the first gets its turn: the second
        # one's time stands still until then.
        clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: time.sleep(0.01))
        with monkeypatch.context() as patch:
            patch.setattr(run_lock, "time", clock)
            with pytest.raises(RunLocked, match="process 1 on here"), RunLock(file, "another"):
                pass
        assert json.loads(file.read_text())["owner"] == "process 1 on here"
    assert not file.exists()
    with RunLock(file, "another", every=0.05):
        assert json.loads(file.read_text())["owner"] == "another"


def test_a_file_that_is_just_being_written_is_no_sign_of_death(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "lock"
    file.write_text("")

    def written(_):
        """Between two looks at it."""
        file.write_text(json.dumps({"owner": "the living", "id": "0", "counter": 8}))

    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=written))
    with pytest.raises(RunLocked, match="the living"), RunLock(file, "another"):
        pass


def test_one_that_was_killed_is_followed(tmp_path):
    file = epath.Path(tmp_path) / "lock"
    file.write_text(json.dumps({"owner": "the dead", "id": "0", "counter": 7}))
    with RunLock(file, "the next", every=0.05):
        assert json.loads(file.read_text())["owner"] == "the next"
    file.write_text('{"own')
    with RunLock(file, "after a cut write", every=0.05):
        assert file.exists()


SLEEPER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from etils import epath
from mor_jax.checkpoint.run_lock import RunLock
with RunLock(epath.Path(sys.argv[2]), "the sleeper", every=0.05):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def test_one_that_was_taken_for_dead_ends_when_it_wakes(tmp_path):
    file = tmp_path / "lock"
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(ROOT), str(file), str(PATIENCE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sleeper.stdout is not None and sleeper.stdout.readline() == "held\n"
    while sleeper.poll() is None:
        # Again, should the sleeper have written just then.
        file.write_text(json.dumps({"owner": "the heir", "id": "1", "counter": 1}))
        time.sleep(0.02)
    _, told = sleeper.communicate(timeout=PATIENCE)
    assert sleeper.returncode == 1
    assert told == f"error: {tmp_path}: the heir took it over\n"


def test_an_object_store_is_held_by_a_lease(monkeypatch):
    asked = []

    class Busy:
        def __init__(self, file, owner):
            asked.append(str(file))

        def __enter__(self):
            raise RunLocked("process 7 on there")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(run_dir, "RunLock", Busy)
    message = r"workdir=gs://bucket/run: process 7 on there is training in it"
    with pytest.raises(ValueError, match=message), run_dir.lock_run_dir("gs://bucket/run"):
        pass
    assert asked == ["gs://bucket/run/lock"]
