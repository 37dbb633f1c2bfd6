"""Exports under the oldest transformers that they are promised to work with.

The newest is the one that all other tests run with; benchmarks/hf_versions.py has those between.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import old_transformers
from support.patience import PATIENCE

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import hf_versions
from hf_checking import environments, models

ROOT = Path(__file__).parents[3]


def test_the_oldest_release_loads_generates_and_trains_exports(tmp_path, monkeypatch):
    # What a reader of the table is told is what is tested here.
    assert hf_versions.VERSIONS[0] == old_transformers.OLDEST
    path = str(old_transformers.directory())
    plain = environments.settings
    monkeypatch.setattr(
        environments, "settings", lambda modules: plain(modules) | {"PYTHONPATH": path}
    )
    folder = models.write("expert-kv-update", tmp_path)
    # Other packages of this environment are too new for Trainer.
    found = hf_versions.examine(Path(sys.executable), [folder], tmp_path / "modules", extra=())
    assert found["transformers"] == old_transformers.OLDEST
    (result,) = found["models"].values()
    row = {"transformers": found["transformers"], "model": folder.name, **result}
    assert hf_versions.good(row) and row["trainer"] is None, hf_versions.line(row)


def test_what_is_wrong_shows_in_the_table_and_in_the_exit_code():
    right = dict.fromkeys(hf_versions.CLOSE, 0.0) | dict.fromkeys(hf_versions.SAME, True)
    row = {"transformers": "9.9.9", "model": "plain", **right}
    assert hf_versions.good(row) and "DIFFERENT" not in hf_versions.line(row)
    for change in ({"topk": 1.0}, {"beams": False}, {"step": float("nan")}):
        wrong = row | change
        assert not hf_versions.good(wrong)
        assert "TOO FAR" in hf_versions.line(wrong) or "DIFFERENT" in hf_versions.line(wrong)
    broken = {"transformers": "9.9.9", "model": "plain", "error": "TypeError: no"}
    assert not hf_versions.good(broken) and "ERROR: TypeError: no" in hf_versions.line(broken)


def test_a_model_that_is_not_there_is_named():
    command = [sys.executable, str(ROOT / "benchmarks" / "hf_versions.py"), "--models=other"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --models=other: must be some of plain, ")


def test_a_release_that_is_none_is_named_before_anything_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_versions.py", "--versions=newest"])
    monkeypatch.setattr(environments, "interpreter", lambda *_: pytest.fail("installs"))
    assert hf_versions.main() == 1
    assert "--versions=newest: must be releases such as 4.56.0,5.24.0" in capsys.readouterr().err


def test_an_environment_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"could not be installed: .*Try pip by hand"):
        environments._made(tmp_path / "none", ("no-such-package==0",))
