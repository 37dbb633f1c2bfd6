"""The directory of a run: free, continued, another run's, or not ours at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mor_jax.checkpoint.run_dir import (
    Change,
    check_workdir,
    claim_workdir,
    lock_run_dir,
    resolved_path,
)
from mor_jax.config import LogConfig, MeshConfig, ModelConfig, RouterConfig, TrainConfig

MODEL = ModelConfig(
    hidden_size=16,
    num_layers=8,
    sharing="middle_cycle",
    num_recursions=3,
    router=RouterConfig(kind="expert", capacity=(1.0, 0.5, 0.25)),
)
CFG = TrainConfig(model=MODEL, steps=1000)


def snapshot(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_new_and_empty_directories_are_free_and_stay_untouched_by_the_check(tmp_path):
    assert check_workdir(tmp_path / "new", CFG) is None
    assert check_workdir(tmp_path, CFG) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_recognises_its_directory(tmp_path):
    assert claim_workdir(tmp_path / "a" / "run", CFG) is None
    assert claim_workdir(tmp_path / "a" / "run", CFG) == []
    text = (tmp_path / "a" / "run" / "config.json").read_text()
    assert TrainConfig.from_dict(json.loads(text)) == CFG


def test_what_a_continued_run_may_change_is_recorded(tmp_path):
    claim_workdir(tmp_path, CFG)
    model = dataclasses.replace(MODEL, remat="block", attention="xla")
    longer = dataclasses.replace(
        CFG, steps=2000, model=model, log=LogConfig(interval=1), mesh=MeshConfig(fsdp=2)
    )
    assert claim_workdir(tmp_path, longer) == []
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2000


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    claim_workdir(tmp_path, CFG)
    before = snapshot(tmp_path)
    router = dataclasses.replace(MODEL.router, capacity=(1.0, 0.5, 0.5))
    model = dataclasses.replace(MODEL, hidden_size=32, router=router)
    other = dataclasses.replace(CFG, model=model, seed=3, steps=7000)
    with pytest.raises(ValueError) as caught:
        claim_workdir(tmp_path, other)
    message = str(caught.value)
    assert "model.hidden_size: 16 there, 32 now" in message
    assert "model.router.capacity: [1.0, 0.5, 0.25] there, [1.0, 0.5, 0.5] now" in message
    assert "seed: 0 there, 3 now" in message
    assert "steps" not in message and "--workdir" in message and "delete" in message
    assert snapshot(tmp_path) == before


def test_settings_of_another_version_are_differences(tmp_path):
    claim_workdir(tmp_path, CFG)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["seed"]
    file.write_text(json.dumps(config | {"old": 1}))
    with pytest.raises(ValueError, match=r"(?s)old: 1 there, absent now.*seed: absent there, 0"):
        check_workdir(tmp_path, CFG)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", r"nor the directory of a run \(no config.json\)"),
        ("config.json", '{"architectures": ["Llama"]}', "not of a run"),
        ("config.json", "[1]", "not of a run"),
        ("config.json", '{"model": ', "is damaged"),
    ],
)
def test_a_directory_of_something_else_is_refused_unharmed(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        claim_workdir(tmp_path, CFG)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, r"cannot be used: .*File name too long\. Choose another --workdir"),
        ("x" * 300 + "/run", r"cannot be used: .*File name too long\."),
        ("abcdefghi/" * 500, r"cannot be used: .*File name too long\."),
        ("a\0b", r"workdir='a\\x00b': is not a directory name\. Give a directory"),
        ("", r"workdir='': is not a directory name"),
        ("~no_user_of_this_name/a", r"cannot be used: Could not determine home directory\."),
    ],
    ids=["long", "inside of a long one", "long path", "NUL", "empty", "no user"],
)
def test_what_cannot_be_a_directory_is_refused_in_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        resolved_path(name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        claim_workdir(file, CFG)


def test_shapes_of_weights_are_not_offered_as_changes(tmp_path):
    claim_workdir(tmp_path, CFG)
    wide = dataclasses.replace(CFG, seed=3, model=dataclasses.replace(CFG.model, hidden_size=64))
    with pytest.raises(
        ValueError, match=r"(?s)model\.hidden_size: .*--allow_changes=seed, or delete"
    ):
        check_workdir(tmp_path, wide)
    alone = dataclasses.replace(wide, seed=CFG.seed)
    with pytest.raises(ValueError, match="use the settings of that run, or delete"):
        check_workdir(tmp_path, alone)


def test_listed_settings_may_differ(tmp_path):
    claim_workdir(tmp_path, CFG)
    optim = dataclasses.replace(CFG.optim, lr=1e-4, b1=0.8)
    other = dataclasses.replace(CFG, optim=optim, seed=3)
    with pytest.raises(ValueError, match=r"(?s)seed: 0 there, 3 now.*--allow_changes=seed,") as e:
        check_workdir(tmp_path, other, ["optim.lr", "optim.b1"])
    assert "optim" not in str(e.value)
    changes = [
        Change("optim.b1", "0.9", "0.8"),
        Change("optim.lr", "0.003", "0.0001"),
        Change("seed", "0", "3"),
    ]
    assert claim_workdir(tmp_path, other, ["optim", "seed"]) == changes
    assert check_workdir(tmp_path, other) == []


@pytest.mark.parametrize("name", ["optim.learning_rate", "opt", "optim."])
def test_an_allowed_change_must_be_a_setting(tmp_path, name):
    with pytest.raises(ValueError, match=rf"allow_changes={name}: unknown setting.*mean optim\."):
        check_workdir(tmp_path, CFG, [name])


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from mor_jax.checkpoint.run_dir import lock_run_dir
with lock_run_dir(sys.argv[2]):
    print("held", flush=True)
    time.sleep(86400)
"""


def test_a_directory_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    root = str(Path(__file__).parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, root, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        host = os.uname().nodename
        message = rf"workdir={tmp_path}: process {holder.pid} on {host} is training in it\. .*stop"
        with pytest.raises(ValueError, match=message), lock_run_dir(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock_run_dir(tmp_path):
        # The same process cannot hold it twice either.
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), lock_run_dir(tmp_path):
            pass
        claim_workdir(tmp_path, CFG)
    assert check_workdir(tmp_path, CFG) == []


def test_an_unclaimed_directory_is_taken_back_and_a_killed_start_leaves_it_free(tmp_path):
    run = tmp_path / "a" / "run"
    with pytest.raises(RuntimeError), lock_run_dir(run):
        (run / "compilation_cache").mkdir()
        (run / "compilation_cache" / "entry-cache").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    run.mkdir(parents=True)
    for name in ("lock", "config.json.draft"):
        (run / name).touch()
    (run / "compilation_cache").mkdir()
    assert check_workdir(run, CFG) is None
    (run / "compilation_cache" / "entry-cache").write_text("somebody's")
    with pytest.raises(RuntimeError), lock_run_dir(run):
        raise RuntimeError
    assert (run / "compilation_cache" / "entry-cache").read_text() == "somebody's"


def as_user(user, call):
    """`call()` with the rights of another user, where this one may do everything."""
    if os.geteuid() != 0:
        return call()
    os.seteuid(user)
    try:
        return call()
    finally:
        os.seteuid(0)


def test_a_read_only_directory_is_refused():
    # Not tmp_path: other users may not look into that.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        (path / "run").mkdir()
        (path / "run").chmod(0o555)
        for run in (path / "run", path / "run" / "new"):
            message = rf"workdir={run}: cannot be written: no permission to write in {path / 'run'}"
            for call in (lambda run=run: check_workdir(run, CFG),):
                with pytest.raises(ValueError, match=message):
                    as_user(65534, call)
        # Where the rights say yes and the file system no, the first write tells.
        (path / "file").write_text("")
        with pytest.raises(ValueError, match=r"file/run: cannot be written"):
            claim_workdir(path / "file" / "run", CFG)
