"""launch/train.py: which exit code and message each end of a run gets."""

import importlib
import os
from types import SimpleNamespace

import pytest

import mor_jax.training.trainer
from configs import vanilla
from mor_jax.checkpoint.checkpointer import DiskFull, WriteFailed
from mor_jax.distributed import initialize
from mor_jax.distributed.heartbeat import HostLost
from mor_jax.runtime import exit_codes
from mor_jax.runtime.preemption import Diverged, Stopped, StoppedEarly

ENDS = [
    (Stopped("SIGTERM: saved"), exit_codes.STOPPED, "stopped: SIGTERM: saved\n", True),
    (StoppedEarly("nothing lost"), exit_codes.STOPPED, "stopped: nothing lost\n", False),
    (Diverged("again"), exit_codes.DIVERGED, "error: again\n", True),
    # Hosts print their message themselves, also where the main thread hangs.
    (HostLost("process 1"), exit_codes.HOST_LOST, "", False),
    (HostLost("process 1 failed", exit_codes.ERROR), exit_codes.ERROR, "", False),
    (ValueError("seed=-1: wrong"), exit_codes.REFUSED, "error: seed=-1: wrong\n", False),
    (WriteFailed("wire cut"), exit_codes.ERROR, "error: wire cut\n", False),
    (DiskFull("no space"), exit_codes.ERROR, "error: no space\n", False),
    (None, None, "", True),
]


@pytest.mark.parametrize(
    ("error", "code", "message", "together"), ENDS, ids=[type(e[0]).__name__ for e in ENDS]
)
def test_every_end_has_its_code(monkeypatch, capsys, error, code, message, together):
    launch, calls = importlib.import_module("mor_jax.cli.train"), []

    def fit(*args):
        calls.append(args)
        if error is not None:
            raise error

    def leave(number):
        raise SystemExit(number)

    monkeypatch.setattr(mor_jax.training.trainer, "fit", fit)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(initialize, "shutdown", lambda: calls.append("shutdown"))
    for name, value in {
        "_CONFIG": vanilla.get_config(),
        "_WORKDIR": "run",
        "_ALLOW": ["seed"],
        "_BRANCH": None,
    }.items():
        monkeypatch.setattr(launch, name, SimpleNamespace(value=value))
    monkeypatch.setattr(launch, "_join", lambda: None)
    if code is None:
        launch.main([])
    else:
        with pytest.raises(SystemExit) as caught:
            launch.main([])
        assert caught.value.code == code
    assert capsys.readouterr().err == message
    # Processes part in order where all of them got here; after an error nobody waits.
    assert ("shutdown" in calls) == together
    assert calls[0][1:3] == ("run", ["seed"])


def test_codes_are_those_of_the_documentation_and_differ():
    names = ("OK", "ERROR", "REFUSED", "STOPPED", "HOST_LOST", "DIVERGED")
    assert [getattr(exit_codes, name) for name in names] == [0, 1, 2, 75, 76, 77]
