"""Forks a run: a new run that starts from a checkpoint of another and ends at another step.

A trapezoid schedule is flat between warm-up and decay, so a run's state in the flat part is also
that of every run with another end: a study trains several budgets from one run in this way. The
fork gets a copy of the checkpoint and of the metrics up to it; the other run is only read.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.checkpoint.checkpointer import INCOMPLETE, Checkpointer, any_complete, step_directory
from mor_jax.config import CheckpointConfig, TrainConfig
from mor_jax.config.parsing import check, fail
from mor_jax.files import read_json_lines, write_atomic
from mor_jax.observability import metrics
from mor_jax.training import optimizer

_END = ("optim.schedule", "optim.decay_steps", "optim.final_lr_ratio")
"""Settings that a fork may change, besides those that any run may change."""


@dataclasses.dataclass(frozen=True)
class Fork:
    """Where a run forks: the checkpoint of the run in `source` after `step`."""

    source: epath.Path
    step: int

    @classmethod
    def parse(cls, text: str) -> "Fork":
        """From `runs/mor@1200`. Raises `ValueError` on another form."""
        source, at, step = text.rpartition("@")
        rule = "must be the directory of a run and one of its steps"
        ok = bool(at and source) and step.isdecimal()
        check(ok, "branch", text, rule, "Write it like runs/mor@1200")
        return cls(run_dir.resolved_path(source), int(step))

    def __str__(self) -> str:
        """In the form that `parse` accepts."""
        return f"{self.source}@{self.step}"


def begin(
    path: epath.Path,
    cfg: TrainConfig,
    branch: Fork,
    allow: Sequence[str] = (),
    fits: Callable[[dict[str, Any]], Any] = lambda facts: None,
) -> None:
    """Makes `path` the directory of a run of `cfg` that starts at `branch`.

    Does nothing for a fork that has a checkpoint already. Repeats an interrupted copy.
    allow: further settings that may differ from the other run's. fits: raises `ValueError` if the
    run cannot resume from a checkpoint with these facts.

    Raises:
        ValueError: the other run has no valid checkpoint of that step, another model, or another
            learning rate before it, or `path` holds a run that did not fork there.
    """
    note = path / run_dir.BRANCH_FILE
    if note.exists() and (there := json.loads(note.read_text())["from"]) != str(branch):
        rule = f"the run in {path} branched off {there}"
        fail("branch", str(branch), rule, "Give that one, or choose another --workdir")
    if any_complete(path):
        rule, fix = (
            f"the run in {path} did not branch off",
            "Leave --branch out to go on with it, or ",
        )
        check(note.exists(), "branch", str(branch), rule, f"{fix}choose another --workdir")
        return
    fits(_check(cfg, branch, allow))
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps({"from": str(branch)}) + "\n")
    run_dir.claim_workdir(path, cfg, allow)
    log = branch.source / metrics.FILE
    if log.exists():
        # The other run may be running: its last line may be incomplete.
        records = [record for _, record in read_json_lines(log)]
        kept = [record for record in records if record["step"] <= branch.step]
        write_atomic(path / metrics.FILE, "".join(f"{json.dumps(r)}\n" for r in kept))
    to = step_directory(path, branch.step)
    if to.exists():
        to.rmtree()
    to.mkdir(parents=True)
    (to / INCOMPLETE).write_text("")
    _copy(step_directory(branch.source, branch.step), to)
    (to / INCOMPLETE).unlink()


def check_begun(path: epath.Path) -> None:
    """Raises `ValueError` if `path` is a fork whose copy was interrupted."""
    note = path / run_dir.BRANCH_FILE
    if jax.process_index() == 0 and note.exists() and not any_complete(path):
        there = json.loads(note.read_text())["from"]
        rule = "was to branch off another run, and has not yet got its checkpoint"
        fail("workdir", str(path), rule, f"Start it with --branch={there}")


def _check(cfg: TrainConfig, branch: Fork, allow: Sequence[str]) -> dict[str, Any]:
    """Facts of the checkpoint to fork from, after all checks."""
    there = (branch.source / run_dir.CONFIG_FILE).exists()
    fix = "Name the --workdir of a training run"
    check(there, "branch", str(branch), f"there is no run in {branch.source}", fix)
    checkpoints = Checkpointer(branch.source, CheckpointConfig())
    try:
        facts = checkpoints.facts(branch.step)
    finally:
        checkpoints.close()
    source = TrainConfig.from_dict(facts["config"])
    changed = run_dir.differences(source, cfg)
    refused = [c for c in changed if not run_dir.is_within(c.setting, (*_END, *allow))]
    if refused:
        listed = "".join(f"\n  {key}: {old} there, {new} now" for key, old, new in refused)
        fix = "Make them alike, or name those meant in --allow_changes"
        fail("branch", str(branch), f"the other run differs in more than its end:{listed}", fix)
    index = jax.numpy.arange(branch.step)
    rates = [
        np.asarray(jax.vmap(optimizer.schedule(c.optim, c.steps))(index)) for c in (source, cfg)
    ]
    # Another number of steps moves the decay, and changes the schedule by rounding in float32.
    apart = np.flatnonzero(np.abs(rates[0] - rates[1]) > 1e-6 * cfg.optim.lr)
    if len(apart):
        rule = f"the learning rates of the two runs differ from step {apart[0] + 1} on"
        fix = "Branch off before the decay of either run begins"
        fail("branch", str(branch), rule, fix)
    return facts


def _copy(source: epath.Path, to: epath.Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            (to / path.name).mkdir(exist_ok=True)
            _copy(path, to / path.name)
        else:
            path.copy(to / path.name, overwrite=True)


__all__ = ["Fork", "begin", "check_begun"]
