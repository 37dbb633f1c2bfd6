"""Runs a study on this machine, each run in a process of its own, several in parallel."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from etils import epath

from mor_jax.checkpoint.run_dir import LOCK_FILE
from mor_jax.checkpoint.run_status import holder
from mor_jax.config.parsing import check, fail
from mor_jax.files import LockHeld, lock, this_process
from mor_jax.runtime import exit_codes
from mor_jax.runtime.preemption import Signals
from mor_jax.scaling.runs.collect import RUNS, progress
from mor_jax.scaling.runs.commands import arguments, check_settings, selected
from mor_jax.scaling.study.manifest import Manifest, Run

_LOCK = "lock"
_POLL = 0.3
_AGAIN = (exit_codes.STOPPED, exit_codes.HOST_LOST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How to run. jobs: parallel runs. retries: of a failed run.

    gpus: GPU ids to divide among the jobs; None: every job sees the devices of this process and
    gets an equal part of its CPU cores. only: see `commands.selected`. train: the training script.
    settings: see `commands.check_settings`.
    """

    train: Path
    jobs: int = 1
    retries: int = 1
    gpus: Sequence[str] | None = None
    only: Sequence[str] = ()
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises `ValueError` on a value out of range."""
        cores = len(os.sched_getaffinity(0))
        most = len(self.gpus) if self.gpus is not None else cores
        if self.gpus is not None:
            rule = "must be GPU ids without repetition"
            ok = 0 < len(self.gpus) == len(set(self.gpus))
            check(ok, "gpus", ",".join(self.gpus), rule, "Try 0,1")
        rule = f"must be in 1 .. {most}, one device or core each"
        check(1 <= self.jobs <= most, "jobs", self.jobs, rule, f"Try {most}")
        check(self.retries >= 0, "retries", self.retries, "must not be negative", "Try 1")
        check_settings(self.settings)


@dataclasses.dataclass(frozen=True)
class Event:
    """A change in the state of a run.

    kind: `start`, `done`, `retry`, `failed`, `blocked`, or `waiting` for another process.
    """

    kind: str
    run: Run
    text: str


@dataclasses.dataclass
class _Job:
    run: Run
    slot: int
    process: subprocess.Popen
    began: float


class StudyStopped(Exception):
    """A signal stopped the study; the running jobs have saved their state."""


def run_local(
    study: epath.PathLike, manifest: Manifest, how: LocalOptions, tell: Callable[[Event], None]
) -> dict[str, str]:
    """Runs the unfinished runs. Returns the failed runs, each with the end of its log.

    A failed run is retried, then skipped; the others continue, except those that need its state.
    Calling it again resumes the study.

    Raises:
        ValueError: another process runs the study, or a directory in it belongs to another run.
        StudyStopped: a signal arrived; the running jobs were signalled to save and exit.
    """
    with _locked(study), Signals() as signals:
        return _Runner(study, manifest, how, tell)(signals)


class _Runner:
    def __init__(
        self,
        study: epath.PathLike,
        manifest: Manifest,
        how: LocalOptions,
        tell: Callable[[Event], None],
    ):
        self._study, self._manifest, self._how, self._tell = study, manifest, how, tell
        self._runs = selected(manifest, how.only)
        self._jobs: list[_Job] = []
        self._attempts: dict[str, int] = {}
        self._failed: dict[str, str] = {}
        self._done: set[str] = set()
        self._waiting: set[str] = set()

    def __call__(self, signals: Signals) -> dict[str, str]:
        # A signal only sets a flag: the jobs have state to save.
        signals.nothing_to_save = ""
        signals.on_exit(lambda _: self._end())
        for found in progress(self._study, self._manifest):
            if found.state == "done":
                self._done.add(found.run.name)
        try:
            while self._fill() or self._jobs:
                if signals.number:
                    raise StudyStopped("stopped: repeat the command to resume")
                time.sleep(_POLL)
                self._reap()
        finally:
            self._end()
        return self._failed

    def _fill(self) -> bool:
        """Starts runs that are ready; returns whether unfinished runs remain."""
        waiting = False
        under_way = {job.run.name for job in self._jobs}
        for run in self._runs:
            if run.name in self._done | self._failed.keys() | under_way:
                continue
            if run.source in self._failed:
                self._failed[run.name] = f"needs the state of {run.source}, which failed"
                self._tell(Event("blocked", run, self._failed[run.name]))
                continue
            waiting = True
            ready = run.source is None or run.source in self._done
            if ready and len(self._jobs) < self._how.jobs and not self._busy(run):
                self._start(run)
        return waiting

    def _busy(self, run: Run) -> bool:
        # Training processes outlive a runner that was killed.
        owner = holder(Path(self._study) / RUNS / run.name / LOCK_FILE)
        if owner and run.name not in self._waiting:
            self._waiting.add(run.name)
            self._tell(Event("waiting", run, f"{owner} is training in its directory"))
        return bool(owner)

    def _start(self, run: Run) -> None:
        slot = min(set(range(self._how.jobs)) - {job.slot for job in self._jobs})
        command = [sys.executable, str(self._how.train)]
        study = Path(self._study).resolve()
        command += arguments(study, self._manifest, run, self._how.settings)
        log = self._log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # In a session of its own: a signal from the terminal reaches it once, through us.
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._how.train.parent.parent,
                env=self._environment(slot),
                start_new_session=True,
            )
        if self._how.gpus is None and self._how.jobs > 1:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, self._cores(slot))
        self._attempts[run.name] = self._attempts.get(run.name, 0) + 1
        self._jobs.append(_Job(run, slot, process, time.monotonic()))
        self._tell(Event("start", run, f"{run.own_steps} steps, log {log}"))

    def _environment(self, slot: int) -> dict[str, str]:
        # Budgets and seeds of one model share compiled functions.
        cache = str(Path(self._study).resolve() / "compilation_cache")
        found = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
        if self._how.gpus is not None:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self._how.gpus[slot :: self._how.jobs])
        return found

    def _cores(self, slot: int) -> list[int]:
        return sorted(os.sched_getaffinity(0))[slot :: self._how.jobs]

    def _log(self, run: Run) -> Path:
        return Path(self._study) / "logs" / f"{run.name}.log"

    def _reap(self) -> None:
        for job in [job for job in self._jobs if job.process.poll() is not None]:
            self._jobs.remove(job)
            self._settle(job)

    def _settle(self, job: _Job) -> None:
        run, code = job.run, job.process.returncode
        took = time.monotonic() - job.began
        mine = next(p for p in progress(self._study, self._manifest) if p.run.name == run.name)
        if code == exit_codes.OK and mine.state == "done":
            self._done.add(run.name)
            self._tell(Event("done", run, f"loss {mine.loss:.4f}, {took:.0f} s"))
            return
        message = mine.problem or self._last_error(run)
        tries = self._attempts[run.name]
        if code in _AGAIN or (tries <= self._how.retries and code != exit_codes.DIVERGED):
            self._tell(Event("retry", run, f"exit code {code} after {took:.0f} s: {message}"))
            return
        self._failed[run.name] = f"exit code {code}: {message}"
        self._tell(Event("failed", run, self._failed[run.name]))

    def _last_error(self, run: Run) -> str:
        lines = self._log(run).read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        return errors[-1][:500]

    def _end(self) -> None:
        # Jobs are left only if the study ended early.
        for job in self._jobs:
            with contextlib.suppress(ProcessLookupError):
                job.process.terminate()
        for job in self._jobs:
            job.process.wait()


@contextlib.contextmanager
def _locked(study: epath.PathLike) -> Iterator[None]:
    path = Path(study) / _LOCK
    rule = "is in an object store; runs on this machine need a local directory"
    fix = "Copy the manifest to a local directory"
    check("://" not in str(study), "study", str(study), rule, fix)
    (Path(study) / RUNS).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a+"))
        try:
            stack.enter_context(lock(file, this_process()))
        except LockHeld as held:
            fail("study", str(study), f"{held} is running it", "Wait for it, or stop it")
        yield


__all__ = ["Event", "LocalOptions", "StudyStopped", "run_local"]
