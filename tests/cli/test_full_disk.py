"""A full disk: nothing half-written stays, and the exit code is not that of refused input."""

import errno
import os

import pytest
from etils import epath
from matplotlib.figure import Figure

from mor_jax.config.parsing import fail
from mor_jax.evaluation import plot
from mor_jax.evaluation.results import EvalLog
from mor_jax.files import write_atomic
from mor_jax.runtime import exit_codes


@pytest.fixture
def full(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Figure, "savefig", refuse)


def told(number):
    try:
        try:
            raise OSError(number, "no")
        except OSError:
            fail("output", "a", "cannot be written", "Choose another")
    except ValueError as error:
        return exit_codes.of(error)


def test_only_what_the_user_can_set_is_a_refusal():
    assert told(errno.ENOSPC) == told(errno.EDQUOT) == exit_codes.ERROR
    assert told(errno.EACCES) == told(errno.ENOENT) == exit_codes.REFUSED
    assert exit_codes.of(ValueError("seed=-1")) == exit_codes.REFUSED


def test_no_draft_and_no_empty_file_stay(full, tmp_path):
    with pytest.raises(OSError, match="No space"):
        write_atomic(epath.Path(tmp_path / "config.json"), "{}")
    with pytest.raises(ValueError, match=r"output=.*No space"):
        EvalLog(tmp_path / "a.jsonl", {"text": "x"}).append(1, {"loss": 2.0})
    values = {"by_position": [], "workdir": "run", "step": 1, "text": "x"}
    with pytest.raises(ValueError, match=r"figure=.*No space"):
        plot.draw(values, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_as_it_was(full, tmp_path):
    kept = tmp_path / "a.jsonl"
    kept.write_text('{"step": 1, "asked": {}}\n')
    with pytest.raises(ValueError, match="No space"):
        EvalLog(kept, {"text": "x"}).append(2, {"loss": 2.0})
    assert kept.read_text().startswith('{"step": 1, "asked": {}}\n')
