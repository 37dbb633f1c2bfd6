"""Evaluates the checkpoints of a run as they are saved, during or after training."""

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
    """Evaluates every checkpoint once, oldest first: existing ones, then each new one.

    Steps with a record in the file are skipped, and so are damaged checkpoints and those that the
    run deletes in the meantime. Ends after the run's last step. While waiting, it reports whether
    the run is training.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        records: EvalLog,
        *,
        poll: float = 30.0,
        report: Callable[[str], None] = print,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """poll: seconds between two checks. report: called with status messages.

        Raises `ValueError` if `directory` is not that of a run.
        """
        self.poll = poll
        check(0 < poll <= 86400, "poll", poll, "must be seconds in (0, 86400]", "Try 30")
        self._path = run_dir.resolved_path(directory)
        run_dir.read_config(self._path)
        self._records, self._report, self._wait = records, report, wait
        self._trainer = TrainerStatus(self._path)
        self._passed: set[int] = set()

    def __call__(self, evaluate: Evaluate) -> Iterator[dict[str, Any]]:
        """Yields records as they are written. evaluate: returns the values to record.

        Raises `ValueError` as `evaluate`; earlier records stay in the file.
        """
        waiting: str | None = None
        while True:
            done = self._records.steps() | self._passed
            new = [step for step in complete_steps(self._path) if step not in done]
            for step in new:
                record = self._one(step, evaluate)
                if record is not None:
                    yield record
            # Read again: the number of steps may have been raised.
            last = run_dir.read_config(self._path).steps
            if last in self._records.steps() | self._passed:
                return
            trainer = self._trainer()
            if new or trainer != waiting:
                self._report(
                    f"waiting for checkpoints of {self._path} up to step {last}{_status(trainer)}"
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
                self._pass(step, "skipped, the run deleted this checkpoint")
            elif found is None:
                self._pass(step, f"skipped: {error}")
            else:
                raise
        return None

    def _pass(self, step: int, why: str) -> None:
        self._passed.add(step)
        self._report(f"step {step}: {why}")


def _status(trainer: str) -> str:
    if trainer:
        return f"; {trainer} is training it"
    return "; no process is training it; resume it with mor train (Ctrl-C exits)"
