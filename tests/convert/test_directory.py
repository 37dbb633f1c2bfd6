"""Output directories are whole or absent, and nobody's work is overwritten unasked."""

import os
import signal
import subprocess
import sys

import pytest

from mor_jax.convert.directory import fresh_directory

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


def test_what_is_there_is_refused_unless_it_may_be_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with fresh_directory(out) as draft:
        (draft / "a").write_text("1")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"), fresh_directory(out):
        pass
    with pytest.raises(RuntimeError), fresh_directory(out, replace=True) as draft:
        (draft / "b").write_text("2")
        raise RuntimeError
    assert names(out) == ["a"]
    with fresh_directory(out, replace=True) as draft:
        (draft / "b").write_text("2")
    assert names(out) == ["b"] and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="is a file"), fresh_directory(out / "b", replace=True):
        pass


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and len(names(tmp_path)) == 1
    with fresh_directory(out) as draft:
        (draft / "a").write_text("1")
    assert names(tmp_path) == ["out"]


def test_draft_of_a_living_writer_stays(tmp_path):
    other = tmp_path / f".partial-out-{os.getppid()}"
    other.mkdir()
    with fresh_directory(tmp_path / "out"):
        pass
    assert other.exists()


@pytest.mark.parametrize("path", ["gs://bucket/out", "/proc/none/out"])
def test_places_that_cannot_be_written(path):
    with pytest.raises(ValueError, match="output="), fresh_directory(path):
        pass
