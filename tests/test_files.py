"""Files that are absent, as before or complete; lines of JSON cut short; locks of one holder."""

import multiprocessing
import os
import socket

import pytest
from etils import epath

from mor_jax import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["text é", b"\x00bytes"])
def test_a_file_is_replaced_whole(tmp_path, content):
    path = epath.Path(tmp_path) / "a.json"
    path.write_text("old")
    files.write_atomic(path, content)
    want = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == want and names(tmp_path) == ["a.json"]


def test_a_new_file_stays_away_when_its_writer_fails(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.new_file(path) as draft:
        assert draft.suffix == ".png" and draft.parent == tmp_path
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.png"]
    with files.new_file(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.png"]


def test_a_directory_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), files.fresh_directory(target) as draft:
        (draft / "a").write_text("half")
        raise RuntimeError
    assert names(target.parent) == []
    with files.fresh_directory(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"] and names(target.parent) == ["out"]


def test_what_may_not_be_replaced_is_put_back(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis").write_text("mine")
    seen = []

    def refuse(there):
        seen.append(names(there))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), files.fresh_directory(target, refuse) as draft:
        (draft / "a").write_text("1")
    assert seen == [["thesis"]] and names(tmp_path) == ["out"] and names(target) == ["thesis"]
    with pytest.raises(FileExistsError), files.fresh_directory(target) as draft:
        (draft / "a").write_text("1")
    assert names(target) == ["thesis"]
    with files.fresh_directory(target, lambda there: None) as draft:
        (draft / "a").write_text("1")
    assert names(target) == ["a"] and names(tmp_path) == ["out"]


def test_drafts_of_dead_processes_are_removed_and_those_of_others_stay(tmp_path):
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    here = f"{socket.gethostname()}-{dead.pid}"
    alive = f".partial-out-{socket.gethostname()}-{os.getppid()}"
    for name in (f".partial-out-{here}", f".partial-out-2-{here}", ".partial-out-host-1", alive):
        (tmp_path / name).mkdir()
    (tmp_path / f".partial-out-replaced-{here}").mkdir()
    files.remove_stale_drafts(tmp_path / "out", lambda there: None)
    left = [f".partial-out-2-{here}", ".partial-out-host-1", alive, "out"]
    assert names(tmp_path) == sorted(left)


@pytest.mark.parametrize(
    ("text", "torn", "want"),
    [
        (b'{"a": 1}\n\n{"a": 2}\n', "none", [(1, {"a": 1}), (3, {"a": 2})]),
        (b'{"a": 1}\n{"a": ', "last", [(1, {"a": 1})]),
        (b'{"a": 1}\n{"a"\n{"a": 2}\n', "any", [(1, {"a": 1}), (3, {"a": 2})]),
        (b"", "none", []),
    ],
)
def test_lines_of_json_are_read_with_their_numbers(tmp_path, text, torn, want):
    path = epath.Path(tmp_path) / "x.jsonl"
    path.write_bytes(text)
    assert list(files.read_json_lines(path, torn=torn)) == want


@pytest.mark.parametrize(
    ("text", "torn", "line"),
    [(b'{"a": ', "none", 1), (b'{"a"\n{"a": 2}\n', "last", 1), (b'{}\n"\xff"\n', "none", 2)],
)
def test_other_lines_are_named(tmp_path, text, torn, line):
    path = epath.Path(tmp_path) / "x.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.jsonl:{line}: is not JSON .*Remove the line"):
        list(files.read_json_lines(path, torn=torn))


@pytest.mark.parametrize(("text", "want"), [("", ""), ("a\n", "a\n"), ("a\nb", "a\nb\n")])
def test_a_torn_line_is_ended_once(tmp_path, text, want):
    path = epath.Path(tmp_path) / "x.jsonl"
    path.write_text(text)
    files.end_torn_line(path)
    files.end_torn_line(path)
    assert path.read_text() == want


def test_a_lock_has_one_holder_who_is_named(tmp_path):
    path = tmp_path / "lock"
    assert files.lock_owner(path) == ""
    with path.open("a+") as mine, files.lock(mine, "process 1 on here"):
        assert files.lock_owner(path) == "process 1 on here"
        with path.open("a+") as other, pytest.raises(files.LockHeld, match="process 1 on here"):
            files.lock(other, "process 2").__enter__()
    assert files.lock_owner(path) == ""
