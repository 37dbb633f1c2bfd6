"""Output directories are complete or absent, and no other work is overwritten."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mor_jax import files
from mor_jax.convert.output_directory import check_target, fresh_directory
from mor_jax.convert.output_manifest import MANIFEST

KILLED = """
import os, signal, sys
from mor_jax.convert.output_directory import fresh_directory
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
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("1")
    # --overwrite would be refused there, so nobody is told to give it.
    with pytest.raises(ValueError, match=r"Choose another directory$"):
        fresh_directory(tmp_path / "mine").__enter__()
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(RuntimeError), fresh_directory(out, replace=True) as draft:
        (draft / "b").write_text("2")
        raise RuntimeError
    assert names(out) == ["config.json", MANIFEST]
    with fresh_directory(out, replace=True) as draft:
        (draft / "b").write_text("2")
    assert names(out) == ["b", MANIFEST] and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="is a file"), fresh_directory(out / "b", replace=True):
        pass
    with pytest.raises(ValueError, match="b is a file"), fresh_directory(out / "b" / "c"):
        pass


def everything(path):
    """All below a directory, with contents."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def write(path, text="mine"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


# Changes to a directory after the conversion, and what the error has to name.
CHANGES = {
    "a file beside": (lambda out: write(out / "thesis.tex"), r"thesis\.tex \(added\)"),
    "hidden": (lambda out: write(out / ".notes"), r"\.notes \(added\)"),
    "deep": (lambda out: write(out / "inner" / "data.csv"), r"inner/data\.csv \(added\)"),
    "an empty directory": (lambda out: (out / "results").mkdir(), r"results \(added\)"),
    "a link": (lambda out: (out / "data").symlink_to("/usr"), r"data \(added\)"),
    "longer": (lambda out: write(out / "config.json", "mine"), r"config\.json \(changed\)"),
    "of the same size": (lambda out: write(out / "config.json", "2"), r"config\.json \(changed\)"),
    "many": (lambda out: [write(out / f"{i}") for i in range(40)], r"17 \(added\) and 30 more"),
    "a run with checkpoints": (
        lambda out: (out / "checkpoints").mkdir(),
        "contains the checkpoints",
    ),
    "no list": (lambda out: (out / MANIFEST).unlink(), f"has no {MANIFEST}.*Delete it yourself"),
    "another list": (lambda out: write(out / MANIFEST, '{"files": [1]}'), f"has no {MANIFEST}"),
    "a damaged list": (lambda out: write(out / MANIFEST, '{"fil'), f"has no {MANIFEST}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_conversion_made_is_ever_replaced(change, tmp_path):
    out = made(tmp_path / "out")
    edit, message = CHANGES[change]
    edit(out)
    before = everything(out)
    with pytest.raises(ValueError, match=message) as error, fresh_directory(out, replace=True):
        pass
    assert everything(out) == before and names(tmp_path) == ["out"]
    assert "\n" not in str(error.value)


def test_a_project_with_a_configuration_is_no_conversion(tmp_path):
    project = tmp_path / "project"
    write(project / "config.json", "{}")
    write(project / "thesis.tex")
    with pytest.raises(ValueError, match=f"has no {MANIFEST}"):
        check_target(project, replace=True)


def test_what_is_added_while_a_conversion_runs_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SMALL", 4)
    out = tmp_path / "out"
    with fresh_directory(out) as draft:
        write(draft / "model", "weights")
    for name, text in (("late.txt", "mine"), ("model", "trained")):
        with (
            pytest.raises(ValueError, match=rf"{name} \((added|changed)\)"),
            fresh_directory(out, replace=True) as draft,
        ):
            write(draft / "model", "others")
            write(out / name, text)
        assert (out / name).read_text() == text and names(tmp_path) == ["out"]
        (out / "late.txt").unlink(missing_ok=True)
        # The first look compares large files by their size; the one before deleting does not.
        check_target(out, replace=True)


def test_a_copied_directory_may_be_replaced(tmp_path):
    copied = shutil.copytree(made(tmp_path / "out"), tmp_path / "copied")
    (copied / "config.json").unlink()
    with fresh_directory(copied, replace=True) as draft:
        write(draft / "b")
    assert names(copied) == ["b", MANIFEST]


def test_what_is_read_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with fresh_directory(out) as draft:
        (draft / "config.json").write_text("1")
        write(draft / "inner" / "a")
    for source in (out, out / "inner", out / "config.json", tmp_path):
        with pytest.raises(ValueError, match=f"is {source}, which is a source"):
            check_target(out, replace=True, sources=[source])
    check_target(out, replace=True, sources=["some/model", tmp_path / "other"])
    check_target(out / "new", replace=True, sources=[out])


def test_two_writers_of_one_place(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="another conversion wrote it"),
        fresh_directory(out) as draft,
    ):
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
    assert names(tmp_path) == ["out"] and names(out) == ["config.json", MANIFEST]


def test_only_leavings_of_the_same_place_are_taken_away(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    end = f"{socket.gethostname()}-{dead.pid}"
    # Another place's only copy, and one that somebody wrote into: a start of its name is no reason.
    others = [f".partial-out-old-replaced-{end}", f".partial-out-replaced-{end}"]
    for name in others:
        write(tmp_path / name / "notes")
    mine = tmp_path / f".partial-out-{end}"
    mine.mkdir()
    made(tmp_path / "out2").rename(tmp_path / "out")
    with fresh_directory(tmp_path / "out", replace=True):
        pass
    assert names(tmp_path) == sorted([*others, "out"])


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
        assert files.remove_drafts() and names(tmp_path) == []
        (draft / "more").write_text("x")
    asked = []
    rename = Path.rename

    def renamed(path, target):
        asked.append(files.remove_drafts())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    made(tmp_path / "out")
    assert asked == [False] and files.remove_drafts() and names(tmp_path) == ["out"]


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


@pytest.mark.parametrize("path", ["", "a\0b", f"{'x' * 300}/out", "d/" * 3000, "\udcff" * 260])
def test_texts_that_are_no_paths(path):
    for name in ("output", "workdir"):
        with pytest.raises(ValueError, match=f"^{name}=") as error:
            check_target(path, name=name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
