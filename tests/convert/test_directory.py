"""Output directories are whole or absent, and nobody's work is overwritten unasked."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mor_jax.convert import directory
from mor_jax.convert.directory import check_target, fresh_directory

KILLED = """
import os, signal, sys
from mor_jax.convert.directory import fresh_directory
with fresh_directory(sys.argv[1]) as draft:
    (draft / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_appears_whole_with_files_that_others_may_read(tmp_path):
    with fresh_directory(tmp_path / "new" / "out") as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "a").write_text("1")
        (draft / "inner" / "a").chmod(0o600)
        assert not (tmp_path / "new" / "out").exists()
    assert names(tmp_path / "new") == ["out"]
    mode = (tmp_path / "new" / "out" / "inner" / "a").stat().st_mode
    assert mode & 0o777 == (tmp_path / "new" / "out").stat().st_mode & 0o666


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), fresh_directory(tmp_path / "out") as draft:
        (draft / "a").write_text("1")
        raise RuntimeError
    assert names(tmp_path) == []


def made(out, name="config.json"):
    """What a conversion leaves in `out`."""
    with fresh_directory(out) as draft:
        (draft / name).write_text("1")
    return out


def test_what_is_there_is_refused_unless_it_may_be_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    made(out)
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"), fresh_directory(out):
        pass
    with pytest.raises(RuntimeError), fresh_directory(out, replace=True) as draft:
        (draft / "b").write_text("2")
        raise RuntimeError
    assert names(out) == ["config.json"]
    with fresh_directory(out, replace=True) as draft:
        (draft / "b").write_text("2")
    assert names(out) == ["b"] and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="is a file"), fresh_directory(out / "b", replace=True):
        pass
    with pytest.raises(ValueError, match="b is a file"), fresh_directory(out / "b" / "c"):
        pass


def test_only_what_a_conversion_made_is_ever_replaced(tmp_path):
    photos, run = made(tmp_path / "photos", "cat.jpg"), made(tmp_path / "run")
    (run / "checkpoints").mkdir()
    for path, reason in ((photos, "not made by a conversion"), (run, "holds the checkpoints")):
        with pytest.raises(ValueError, match=reason), fresh_directory(path, replace=True):
            pass
    assert names(photos) == ["cat.jpg"] and names(run) == ["checkpoints", "config.json"]


def test_what_is_read_is_not_replaced(tmp_path):
    out = made(tmp_path / "out")
    (out / "inner").mkdir()
    for source in (out, out / "inner", out / "config.json", tmp_path):
        with pytest.raises(ValueError, match=f"is {source}, which is read"):
            check_target(out, replace=True, sources=[source])
    check_target(out, replace=True, sources=["some/model", tmp_path / "other"])
    check_target(out / "new", replace=True, sources=[out])


def test_two_writers_of_one_place(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="meanwhile"), fresh_directory(out) as draft:
        (draft / "a").write_text("1")
        out.mkdir()
        (out / "first").write_text("1")
    assert names(out) == ["first"] and names(tmp_path) == ["out"]


def test_a_directory_is_put_back_if_the_writer_died_between_the_two_renames(tmp_path):
    out = made(tmp_path / "out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    out.rename(tmp_path / f".partial-out-replaced-{socket.gethostname()}-{dead.pid}")
    with pytest.raises(ValueError, match="not empty"), fresh_directory(out):
        pass
    assert names(tmp_path) == ["out"] and names(out) == ["config.json"]


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and len(names(tmp_path)) == 1
    with fresh_directory(out) as draft:
        (draft / "a").write_text("1")
    assert names(tmp_path) == ["out"]


def test_a_stop_takes_away_what_was_begun_unless_it_is_complete(tmp_path, monkeypatch):
    with pytest.raises(ValueError), fresh_directory(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        assert directory.abandon() and names(tmp_path) == []
        (draft / "more").write_text("x")
    asked = []
    rename = Path.rename

    def renamed(path, target):
        asked.append(directory.abandon())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    made(tmp_path / "out")
    assert asked == [False] and directory.abandon() and names(tmp_path) == ["out"]


def test_draft_of_a_living_writer_stays(tmp_path):
    here = f".partial-out-{socket.gethostname()}-{os.getppid()}"
    elsewhere = ".partial-out-another.host-1"
    for name in (here, elsewhere):
        (tmp_path / name).mkdir()
    with fresh_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([here, elsewhere, "out"])


@pytest.mark.parametrize("path", ["gs://bucket/out", "/proc/none/out"])
def test_places_that_cannot_be_written(path):
    with pytest.raises(ValueError, match="output="), fresh_directory(path):
        pass
