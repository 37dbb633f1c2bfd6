"""The modelling file of exports: sealed when written, refreshed later, edits never lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hf_model import torch_model
from support.tiny import TINY
from transformers import AutoModelForCausalLM

from mor_jax.convert import modeling_file
from mor_jax.convert.hf_config import AUTO_MAP
from mor_jax.convert.modeling_file import MODELING, modeling_text, refresh
from mor_jax.convert.output_manifest import check_unmodified, write_manifest
from mor_jax.runtime import exit_codes

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "launch" / "convert.py"), "refresh"]
OLD = '"""A model as exports had it once."""\n'
# As a newer or an older mor_jax would have written it.
NEWER = "FILE_VERSION = 99\n"
OLDER = "FILE_VERSION = 1\n"
NOW = int(re.search(r"^FILE_VERSION = (\d+)$", modeling_text(), re.MULTILINE)[1])


def sealed(body):
    return f"{body}\n{modeling_file._SEAL}{modeling_file._sum(body)}\n"


@pytest.fixture
def export(tmp_path, monkeypatch):
    """A directory that says to be an export, with an unnumbered modelling file."""
    monkeypatch.setattr(modeling_file, "_UNNUMBERED", {modeling_file._sum(OLD)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mor", "auto_map": AUTO_MAP}))
    (tmp_path / MODELING).write_text(OLD)
    return tmp_path


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("text", "told"), [(OLD, "an unnumbered version"), (sealed(OLDER), "version 1 (")]
)
def test_an_older_file_is_renewed_and_nothing_else(export, text, told):
    (export / MODELING).write_text(text)
    (export / MODELING).chmod(0o640)
    before = state(export)
    done = refresh(export)
    assert done.changed and done.backup is None and done.before.startswith(told)
    assert done.after.startswith(f"version {NOW} (")
    assert state(export) == before | {MODELING: modeling_text().encode()}
    assert (export / MODELING).stat().st_mode & 0o777 == 0o640
    again = refresh(export)
    assert not again.changed and again.before == again.after == done.after


def test_a_renewed_export_may_still_be_replaced(export):
    write_manifest(export)
    refresh(export)
    check_unmodified(export, export, "path")
    (export / MODELING).write_text(sealed(NEWER) + "x")
    with pytest.raises(ValueError, match=r"modeling_mor\.py \(changed\)"):
        check_unmodified(export, export, "path")
    backup = refresh(export, force=True).backup
    with pytest.raises(ValueError, match=rf"made: {backup.name} \(added\)\."):
        check_unmodified(export, export, "path")


def test_a_file_that_is_missing_is_written(export):
    (export / MODELING).unlink()
    assert refresh(export).before == "no file"
    assert (export / MODELING).read_text() == modeling_text()


@pytest.mark.parametrize("text", [OLD + "x = 1\n", sealed(OLDER).replace("1", "2", 1), "\udcff"])
def test_a_changed_file_stays_unless_it_is_forced_and_then_beside(export, text):
    contents = text.encode(errors="surrogateescape")
    (export / MODELING).write_bytes(contents)
    with pytest.raises(ValueError, match=r"modeling_mor.py': was changed.*--force"):
        refresh(export)
    assert (export / MODELING).read_bytes() == contents
    done = refresh(export, force=True)
    assert done.backup.read_bytes() == contents
    assert (export / MODELING).read_text() == modeling_text()


def test_line_ends_of_windows_are_no_change(export):
    (export / MODELING).write_bytes(sealed(OLDER).replace("\n", "\r\n").encode())
    done = refresh(export)
    assert done.changed and done.backup is None


def test_an_empty_path_and_a_directory_in_the_way_are_refused(export, monkeypatch):
    monkeypatch.chdir(export)
    with pytest.raises(ValueError, match="is empty"):
        refresh("")
    (export / MODELING).unlink()
    (export / MODELING).mkdir()
    with pytest.raises(ValueError, match="must be a file"):
        refresh(export)


def test_a_newer_file_stays_unless_it_is_forced(export):
    (export / MODELING).write_text(sealed(NEWER))
    with pytest.raises(ValueError, match=r"is version 99 .*newer.*Update mor_jax"):
        refresh(export)
    assert (export / MODELING).read_text() == sealed(NEWER)
    assert refresh(export, force=True).changed


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "config.json=None: is missing"),
        ({"model_type": "llama"}, "model_type='llama': only exports of type mor"),
        ({"model_type": "mor"}, "auto_map=None: must name the classes"),
        (
            {"model_type": "mor", "auto_map": {"AutoConfig": "owner/name--modeling_mor.MoRConfig"}},
            "auto_map=.*owner/name",
        ),
    ],
)
def test_what_is_no_export_is_refused(export, config, told):
    (export / "config.json").unlink()
    if config is not None:
        (export / "config.json").write_text(json.dumps(config))
    before = state(export)
    with pytest.raises(ValueError, match=told):
        refresh(export, force=True)
    assert state(export) == before


def test_a_full_disk_leaves_the_old_file(export, monkeypatch):
    before = state(export)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device"):
        refresh(export)
    assert state(export) == before


def test_what_a_killed_refresh_left_is_taken_away(export):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = export / f".partial-{MODELING}-{os.uname().nodename}-{dead.pid}"
    left.write_text("half")
    refresh(export)
    assert not left.exists()


def test_the_command_renews_a_saved_model_that_then_generates(tmp_path):
    """The way of somebody who fine-tuned an export of long ago."""
    saved = tmp_path / "saved"
    torch_model(TINY["expert"]).save_pretrained(saved)
    body = (saved / MODELING).read_text().replace(f"FILE_VERSION = {NOW}", "FILE_VERSION = 1")
    (saved / MODELING).write_text(sealed(body))
    lines = []
    for _ in range(2):
        done = subprocess.run([*COMMAND, f"--path={saved}"], capture_output=True, text=True)
        assert done.returncode == exit_codes.OK and not done.stderr, done.stderr
        lines += done.stdout.splitlines()
    assert (
        len(lines) == 2
        and "refreshed, from version 1 (" in lines[0]
        and f"to version {NOW}" in lines[0]
    )
    assert f"is current, version {NOW}" in lines[1]
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    ids = torch.arange(8)[None]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 12)
    # Saving carries the file along as it was written.
    model.save_pretrained(tmp_path / "again")
    assert not refresh(tmp_path / "again").changed
    done = subprocess.run([*COMMAND, f"--path={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == exit_codes.REFUSED
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
