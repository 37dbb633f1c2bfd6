"""The training loop: steps, evaluations, checkpoints, early stops."""

import concurrent.futures
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from rich.console import Console

from mor_jax.models.flops import flops
from mor_jax.observability.metrics import Metrics, Record
from mor_jax.observability.profiling import Profile, memory, memory_line
from mor_jax.observability.progress import Meter, Progress
from mor_jax.runtime.hardware import peak_flops
from mor_jax.runtime.preemption import Stopped
from mor_jax.training.batch_iterator import BatchIterator
from mor_jax.training.run import ResumePoint, Run, RunServices, TrainResult
from mor_jax.training.train_state import fields

_A_BATCH = 1.0
"""Seconds that a stop waits for the evaluation of a batch; a compilation takes longer."""


class SkippedTooMany(Exception):
    """Too many steps in a row were not finite. bad: first sequence of each. step: the last."""

    def __init__(self, step: int, bad: tuple[int, ...]):
        super().__init__(f"step {step}")
        self.step, self.bad = step, bad


class _Interrupted(Exception):
    """A signal interrupted an evaluation."""


class Loop:
    """Runs the steps from a start to the end. Every process of the run calls it."""

    def __init__(self, run: Run, services: RunServices, start: ResumePoint, batches: BatchIterator):
        self._run, self._services, self._start, self._batches = run, services, start, batches
        self._state, self._bad = start.state, list(start.bad)
        self._first = int(start.state.step)
        self._meter = _meter(run)
        self._evaluated: dict[str, Any] = {}
        self._save_pending = False

    def __call__(self) -> TrainResult:
        """Raises `Stopped` after a signal, `SkippedTooMany` when steps keep being skipped."""
        cfg, run = self._run.cfg, self._run
        with (
            jax.set_mesh(run.mesh),
            Metrics(
                run.path,
                cfg.log,
                config=cfg.to_dict(),
                start_step=self._first,
                again="eval/" if self._start.eval_pending else None,
            ) as metrics,
            Progress(cfg.steps, self._meter, console=_console()) as progress,
            Profile(run.path, cfg.profile) as profile,
        ):
            self._metrics, self._progress = metrics, progress
            self._services.signals.on_exit(lambda _: progress.__exit__())
            self._services.events.restart_clock()
            if self._start.eval_pending and (caught := self._evaluate(self._first)):
                self._stop(self._first, caught)
            for step in range(self._first + 1, cfg.steps + 1):
                if not self._compiled(step):
                    number = self._services.signals.number
                    self._save(step - 1, number)
                    self._stop(step - 1, number)
                self._step(step, profile)
                caught = self._services.stop_consensus(self._services.signals.number)
                if not caught and self._to_evaluate(step):
                    caught = self._evaluate(step)
                self._save(step, caught)
                if caught:
                    self._stop(step, caught)
            self._services.checkpoints.wait()
            self._services.signals.nothing_to_save = "the last step was saved"
            if not self._evaluated:
                with progress.busy("evaluating"):
                    self._evaluated = run.evaluator(self._state.params)
        return TrainResult(self._state, self._evaluated, self._meter)

    def _step(self, step: int, profile: Profile) -> None:
        run, events = self._run, self._services.events
        self._services.peers.phase(f"step {step}")
        number, batch = self._batches.next()
        program = run.steps(step)
        profile.before(step)
        self._state, scalars = program(self._state, run.place(batch))
        if step == self._first + 1:
            jax.block_until_ready(scalars)
            self._under_way(program)
        host = {"tokens_per_second": self._meter.tokens_per_second or 0.0, "position": number}
        self._report(self._metrics.push(step, scalars, host))
        events.step(step, self._batches.waited)
        if done := profile.after(step, scalars):
            self._progress.note(done)

    def _compiled(self, step: int) -> bool:
        """Waits for the compiled step; False if a signal came first and the state can be saved."""
        made = self._run.steps.prepare(step)
        if made.done():
            return True
        self._services.peers.phase(f"compilation for step {step}")
        with self._services.events.timed("compile", step=step):
            while True:
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    made.exception(_A_BATCH)
                    return True
                self._services.signals.check()
                # Several processes would have to agree; they wait for the compilation instead.
                saveable = step > self._first + 1 and jax.process_count() == 1
                if saveable and self._services.signals.number:
                    return False

    def _under_way(self, program: Any) -> None:
        self._services.signals.mark_unsaved()
        report = memory(program)
        self._services.events.write("memory", **report)
        self._progress.note(memory_line(report))
        self._seal()

    def _seal(self) -> None:
        if self._services.cache is not None:
            self._services.cache.seal()

    def _report(self, record: Record | None) -> None:
        # Shows the metrics of a step and counts those that were skipped.
        if record is None:
            return
        shares: Any = record.values.get("depth_share", ())
        self._progress.update(record.step, float(record.values["ce"]), shares)
        if not record.values["skipped_in_a_row"]:
            self._bad.clear()
            return
        position = int(record.values["position"])
        self._bad.append(position)
        self._services.events.write("skipped", step=record.step, position=position)
        self._progress.note(
            f"step {record.step}, sequence {position}: loss or gradient not finite, update skipped"
        )
        if record.values["skipped_in_a_row"] >= self._run.cfg.optim.max_skipped_steps:
            raise SkippedTooMany(record.step, tuple(self._bad))

    def _to_evaluate(self, step: int) -> bool:
        cfg = self._run.cfg
        return step == cfg.steps or _due(step, cfg.eval.interval, cfg.steps)

    def _evaluate(self, step: int) -> int:
        """Evaluates after `step`; returns the signal that interrupted it, or 0."""
        self._services.peers.phase(f"evaluation after step {step}")
        self._report(self._metrics.flush())
        signals: list[int] = []
        evaluator = dataclasses.replace(
            self._run.evaluator, step=self._between(self._run.evaluator.step, signals)
        )
        with self._progress.busy("evaluating"), self._services.events.timed("eval", step=step):
            try:
                self._evaluated = self._wait_for(partial(evaluator, self._state.params))
            except _Interrupted:
                return signals[0] if signals else self._services.signals.number
        self._metrics.write(step, {f"eval/{k}": v for k, v in self._evaluated.items()})
        return 0

    def _between(self, evaluate: Callable[..., Any], signals: list[int]) -> Callable[..., Any]:
        # `evaluate` that checks for signals before every batch.
        def watched(*args: Any) -> Any:
            if caught := self._services.stop_consensus(self._services.signals.number):
                signals.append(caught)
                raise _Interrupted
            return jax.block_until_ready(evaluate(*args))

        return watched

    def _wait_for(self, call: Callable[[], Any]) -> Any:
        # A compilation cannot be interrupted. In another thread it may continue while the state
        # is saved. Several processes have to run everything in the same order, and wait.
        if jax.process_count() > 1:
            return call()
        made: concurrent.futures.Future[Any] = concurrent.futures.Future()
        threading.Thread(target=self._settle, args=(made, call)).start()
        while True:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return made.result(_A_BATCH)
            if self._services.signals.number and not made.done():
                raise _Interrupted

    def _settle(self, made: "concurrent.futures.Future[Any]", call: Callable[[], Any]) -> None:
        try:
            with jax.set_mesh(self._run.mesh):
                made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    def _save(self, step: int, caught: int) -> None:
        cfg = self._run.cfg
        last = step == cfg.steps
        self._save_pending |= (
            _due(step, cfg.checkpoint.interval, cfg.steps) or step in cfg.checkpoint.keep_steps
        )
        if not (caught or last or self._save_pending):
            return
        self._report(self._metrics.flush())
        if self._bad and not (caught or last):
            # Checkpoints during skipped steps must not replace the one to roll back to.
            return
        self._save_pending = False
        start = dataclasses.replace(
            self._start, bad=tuple(self._bad), eval_pending=bool(caught) and self._to_evaluate(step)
        )
        extra = {"fingerprint": self._run.fingerprint} | start.notes()
        self._services.peers.phase(f"save of step {step}")
        state = fields(self._state)
        with self._services.events.timed("save", step=step):
            self._services.checkpoints.save(
                step, state, self._batches.position, self._run.cfg.to_dict(), extra
            )
        self._seal()

    def _stop(self, step: int, caught: int) -> None:
        with self._services.events.timed("save", step=step):
            self._services.checkpoints.wait()
        name = signal.Signals(caught).name
        self._services.events.write("stop", step=step, reason=name)
        saved = f"stopped after step {step}, saved in {self._run.path}"
        raise Stopped(f"{name}: {saved}. Run the same command again to resume")


def _due(step: int, every: int | None, steps: int) -> bool:
    return every is not None and step % every == 0 and step < steps


def _console() -> Console:
    # Only the first process prints.
    return Console(quiet=jax.process_index() != 0)


def _meter(run: Run) -> Meter:
    peak = peak_flops(jax.devices()[0].device_kind)
    return Meter(
        run.cfg.batch_size * run.cfg.seq_len,
        flops_per_token=flops(run.cfg.model, run.cfg.seq_len).training(),
        peak_flops=None if peak is None else peak * jax.device_count(),
    )


__all__ = ["Loop", "SkippedTooMany"]
