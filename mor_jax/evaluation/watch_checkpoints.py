"""Evaluating a run's checkpoints as they come, while it trains or after."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.checkpoint.checkpointer import complete_steps
from mor_jax.checkpoint.load_weights import RunWeights, load_run
from mor_jax.checkpoint.run_status import TrainerStatus
from mor_jax.config.parsing import check
from mor_jax.evaluation.results import EvalLog

Evaluate = Callable[[RunWeights], Mapping[str, Any]]


class CheckpointWatcher:
    """Every checkpoint once, the oldest first: those that are there, then each new one.

    Steps in the file of records are not done again. The run may delete a checkpoint meanwhile; it
    is passed over then, and so is one that is damaged. Ends when the run's last step is done. While
    it waits it tells whether somebody trains.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        records: EvalLog,
        *,
        poll: float = 30.0,
        told: Callable[[str], None] = print,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """poll: seconds between two looks. told: called with news for people.

        Raises `ValueError` if `directory` is not that of a run.
        """
        self.poll = poll
        check(0 < poll <= 86400, "poll", poll, "must be seconds in (0, 86400]", "Try 30")
        self._path = run_dir.resolved_path(directory)
        run_dir.read_config(self._path)
        self._records, self._told, self._wait = records, told, wait
        self._trainer = TrainerStatus(self._path)
        self._passed: set[int] = set()

    def __call__(self, evaluate: Evaluate) -> Iterator[dict[str, Any]]:
        """Records as they are written. evaluate: gives what is recorded of a checkpoint.

        Raises `ValueError` as `evaluate`; what was recorded stays.
        """
        waiting: str | None = None
        while True:
            done = self._records.steps() | self._passed
            new = [step for step in complete_steps(self._path) if step not in done]
            for step in new:
                record = self._one(step, evaluate)
                if record is not None:
                    yield record
            # Read again: a run may have been given more steps.
            last = run_dir.read_config(self._path).steps
            if last in self._records.steps() | self._passed:
                return
            trainer = self._trainer()
            if new or trainer != waiting:
                self._told(
                    f"waiting for checkpoints of {self._path} up to step {last}{_of(trainer)}"
                )
                waiting = trainer
            self._wait(self.poll)

    def _one(self, step: int, evaluate: Evaluate) -> dict[str, Any] | None:
        found: RunWeights | None = None
        try:
            found = load_run(self._path, step)
            return self._records.append(step, evaluate(found))
        except (ValueError, OSError) as error:
            if step not in complete_steps(self._path):
                self._pass(step, "the run has deleted this checkpoint meanwhile")
            elif found is None:
                self._pass(step, f"passed over: {error}")
            else:
                raise
        return None

    def _pass(self, step: int, why: str) -> None:
        self._passed.add(step)
        self._told(f"step {step}: {why}")


def _of(trainer: str) -> str:
    if trainer:
        return f"; {trainer} trains there"
    told = "nobody trains there now, so there are none before launch/train.py goes on with it"
    return f"; {told} (Ctrl-C ends this)"
