"""`fit`: builds a run from its configuration, trains it, rolls back once if it diverges.

The loop is in `loop.py`, the training step in `train_step.py`.
"""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import jax
from etils import epath

from mor_jax import data
from mor_jax.checkpoint import pretrained, run_dir
from mor_jax.checkpoint.checkpointer import Checkpointer, DiskFull, any_complete
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check
from mor_jax.distributed import mesh as sharding
from mor_jax.distributed.heartbeat import PeerMonitor
from mor_jax.distributed.startup_check import agree_on_start, gather
from mor_jax.distributed.stop_consensus import StopConsensus
from mor_jax.models.attention_kernels.dispatch import check_kernel
from mor_jax.models.layers.remat import check_remat
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.observability.event_log import FILE, Events, read
from mor_jax.observability.goodput import goodput
from mor_jax.runtime.compilation_cache import use_cache_dir
from mor_jax.runtime.host_memory import keep_freed_memory
from mor_jax.runtime.preemption import Diverged, ImmediateExit, Signals, Stopped, StoppedEarly
from mor_jax.training.batch_iterator import BatchIterator
from mor_jax.training.compiled_step import CompiledSteps, abstract_state, first_state, fresh_state
from mor_jax.training.data_position import check_state, newest, resumed_position
from mor_jax.training.evaluator import Evaluator
from mor_jax.training.fork import Fork, begin, check_begun
from mor_jax.training.loop import Loop, SkippedTooMany
from mor_jax.training.memory_check import check_memory
from mor_jax.training.report import finish
from mor_jax.training.resolved_settings import resolve_settings_in
from mor_jax.training.run import ResumePoint, Run, RunServices, batch_layout, place
from mor_jax.training.train_state import TrainState, fields

_T = TypeVar("_T")


def fit(
    cfg: TrainConfig,
    directory: epath.PathLike,
    allow_changes: Sequence[str] = (),
    signals: Signals | None = None,
    branch: Fork | None = None,
) -> dict[str, Any]:
    """Trains `cfg` in `directory`, from its newest good checkpoint if there is one.

    Settings, data and directory are checked before anything is written. A resumed run is bitwise
    identical to one that was never stopped.

    allow_changes: settings that may differ from the last start, see `check_workdir`. signals: the
    signal handler, if one listens already. branch: where a run without a checkpoint of its own
    starts, see `mor_jax.training.fork`.

    Returns: the last evaluation; see `Evaluator`.

    Raises:
        ValueError: a setting, the data or the directory does not fit; nothing was changed.
        Stopped: a signal ended the run early; the same call resumes it.
        Diverged: too many steps in a row were not finite, also after one rollback.
        WriteFailed: a checkpoint could not be written.
        HostLost: another process of the run died or hung.
    """
    with signals or Signals() as signals:
        signals.polls = True
        try:
            path = run_dir.resolved_path(directory)
            _prepare(cfg)
            places = [path] if branch is None else [path, branch.source]
            cfg = _in_all_processes(partial(resolve_settings_in, places, cfg, sharding.platform()))
            signals.check()
            return _fit(cfg, path, allow_changes, signals, branch)
        except ImmediateExit as left:
            raise StoppedEarly(f"{left}. Run the same command again") from None
        finally:
            signals.polls = False


def _prepare(cfg: TrainConfig) -> None:
    keep_freed_memory()
    jax.config.update("jax_threefry_partitionable", True)
    cfg.validate_start()
    check_kernel(cfg.model.attention, sharding.platform())
    agree_on_start(cfg.to_dict())


def _begin(run: Run, allow: Sequence[str], branch: Fork) -> None:
    def fits(facts: dict[str, Any]) -> None:
        resumed_position(facts, run.cfg, run.beginning, run.fingerprint)

    if jax.process_index() == 0:
        begin(run.path, run.cfg, branch, allow, fits)


def _fit(
    cfg: TrainConfig,
    path: epath.Path,
    allow: Sequence[str],
    signals: Signals,
    branch: Fork | None,
) -> dict[str, Any]:
    changes = _in_all_processes(lambda: run_dir.check_workdir(path, cfg, allow)) or []
    with contextlib.ExitStack() as stack:
        undo = _in_all_processes(lambda: stack.enter_context(run_dir.lock_run_dir(path)))
        signals.on_exit(lambda _: undo())
        cache = stack.enter_context(use_cache_dir(path, cfg.compilation_cache))
        peers = stack.enter_context(PeerMonitor(path, cfg.hosts.heartbeat_timeout))
        signals.on_exit(peers.stopped)
        try:
            peers.phase("assembling")
            run = _assemble(cfg, path, signals.check)
            if branch is not None:
                _in_all_processes(partial(_begin, run, allow, branch))
            _in_all_processes(partial(_check_initial, run))
            _in_all_processes(partial(_check_newest, run))
            signals.check()
            if jax.process_index() == 0:
                run_dir.claim_workdir(path, cfg, allow)
            events = stack.enter_context(Events(path, signals.since))
            checkpoints = stack.enter_context(Checkpointer(path, cfg.checkpoint))
            services = RunServices(
                checkpoints=checkpoints,
                events=events,
                signals=signals,
                stop_consensus=StopConsensus(run.mesh),
                cache=cache,
                peers=peers,
            )
            return _work(run, services, changes)
        except ImmediateExit as left:
            peers.stopped(str(left))
            raise
        except Stopped:
            raise
        except Diverged:
            # All processes diverge at the same step.
            peers.finished()
            raise
        except Exception as error:
            # Reported before anything waits for other processes, which may wait for this one.
            lost = None if isinstance(error, DiskFull) else peers.diagnose(error)
            if lost is not None:
                raise lost from error
            peers.failed(error)
            raise


def _in_all_processes(call: Callable[[], _T]) -> _T:
    """`call()` in every process of the run; a `ValueError` of one is raised in all."""
    found, problem = None, ""
    try:
        found = call()
    except ValueError as error:
        problem = str(error)
    problems = [text for text in gather(problem) if text]
    if problems:
        raise ValueError(problems[0])
    return cast(_T, found)


def _work(run: Run, services: RunServices, changes: Sequence[run_dir.Change]) -> dict[str, Any]:
    """Starts and trains; prints the goodput at the end, however the run ends."""
    _open_log(run, services.events, changes)
    try:
        start = _start(run, services, changes)
        services.signals.check()
        return _train(run, services, start)
    finally:
        services.events.flush()
        if jax.process_index() == 0:
            print(goodput(read(run.path / FILE)).line(), flush=True)


def _open_log(run: Run, events: Events, changes: Sequence[run_dir.Change]) -> None:
    """Writes the events of the start: host, devices, allowed changes."""
    ready = time.monotonic() - events.began
    where = {"host": socket.gethostname(), "process": os.getpid(), "devices": jax.device_count()}
    events.write("start", **where)
    events.write("assemble", seconds=ready)
    for setting, old, new in changes:
        events.write("changed", setting=setting, old=old, new=new)
        if jax.process_index() == 0:
            print(f"allowed change: {setting}: {old} -> {new}")


def _train(run: Run, services: RunServices, start: ResumePoint) -> dict[str, Any]:
    """Runs the loop, once more from an earlier checkpoint after too many skipped steps."""
    began = int(start.state.step), time.perf_counter()
    while True:
        with BatchIterator(partial(run.batches, start), start.position.row) as feed:
            with services.events.timed("open", position=start.position.row):
                feed.open()
            try:
                trained = Loop(run, services, start, feed)()
                break
            except SkippedTooMany as skipped:
                problem = skipped
        start = _roll_back(run, services, start, problem)
    with services.events.timed("finish"):
        finish(run, trained, began)
    services.events.write("end", step=int(trained.state.step))
    if services.cache is not None:
        services.cache.seal(idle=True)
    return trained.evaluated


def _assemble(cfg: TrainConfig, path: epath.Path, look: Callable[[], None]) -> Run:
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_batch_size(mesh, "batch_size", cfg.batch_size, cfg.grad_accum_steps)
    sharding.check_batch_size(mesh, "eval.batch_size", cfg.eval.batch_size)
    sharding.check_seq_len(mesh, cfg.seq_len)
    check_remat(cfg.model.remat)
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), abstract_params(cfg.model))
    abstract = abstract_state(cfg, mesh, placement)
    check_memory(cfg, mesh, abstract)
    steps = CompiledSteps(cfg, mesh, abstract)
    if cfg.model.router.capacity_warmup_steps == 0:
        steps.prepare(1)
    tokenizer = data.load_tokenizer(cfg.data.tokenizer)
    data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    _check_completion(cfg, tokenizer)
    look()
    layout = batch_layout(mesh, cfg, cfg.eval.batch_size)
    given, multiple = (cfg.data, tokenizer, layout, cfg.eval.batches), sharding.batch_shards(mesh)
    heldout = data.validation_batches(*given, multiple=multiple)
    evaluator = Evaluator.of(cfg, [place(mesh, batch) for batch in heldout])
    look()
    fingerprint = data.fingerprint(cfg.data, tokenizer)
    beginning = data.position_of(cfg.data, tokenizer, length=cfg.seq_len, seed=cfg.seed)
    return Run(cfg, path, mesh, tokenizer, evaluator, fingerprint, beginning, abstract, steps)


def _check_completion(cfg: TrainConfig, tokenizer: data.Tokenizer) -> None:
    """Raises `ValueError` if prompt and completion of the summary exceed the context."""
    room = cfg.model.max_seq_len - len(tokenizer.encode(cfg.eval.prompt))
    rule = f"with eval.prompt it exceeds model.max_seq_len={cfg.model.max_seq_len}"
    wanted, fix = cfg.eval.completion_tokens, f"Use at most {max(room, 0)}"
    check(wanted <= max(room, 0), "eval.completion_tokens", wanted, rule, fix)


def _start(run: Run, services: RunServices, changes: Sequence[run_dir.Change]) -> ResumePoint:
    """The newest good checkpoint, or a new state."""
    start = _from(run, services, services.checkpoints.latest_valid())
    # A changed setting may get past a divergence: it has the one rollback again.
    return dataclasses.replace(start, rolled_back=False) if changes else start


def _from(run: Run, services: RunServices, step: int | None) -> ResumePoint:
    """The checkpoint of `step`, or a new state for None."""
    if step is None:
        return ResumePoint(state=_new_state(run, services), position=run.beginning)
    with services.events.timed("restore", step=step):
        restored = services.checkpoints.restore(fields(run.abstract), step)
    there = resumed_position(restored._asdict(), run.cfg, run.beginning, run.fingerprint)
    return ResumePoint.of(TrainState(**restored.state), there, restored.extra)


def _check_newest(run: Run) -> None:
    """Raises `ValueError` if the newest checkpoint does not fit; changes nothing."""
    facts = newest(run.path)
    if facts is not None:
        check_state(facts, run.cfg, fields(run.abstract))
        resumed_position(facts, run.cfg, run.beginning, run.fingerprint)


def _check_initial(run: Run) -> None:
    """Raises `ValueError` if the weights to start from are damaged or of another model."""
    rule = "some processes find weights to start from in the run directory, others do not"
    fix = "Use a directory that all of them share"
    check(len(set(gather(pretrained.present(run.path)))) == 1, "workdir", str(run.path), rule, fix)
    check_begun(run.path)
    if jax.process_index() == 0 and pretrained.present(run.path) and not any_complete(run.path):
        pretrained.verify(run.path, run.cfg.model)


def _new_state(run: Run, services: RunServices) -> TrainState:
    """The state before the first step: imported weights, or random ones."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
    given = pretrained.origin(run.path)
    with services.events.timed("fresh", step=0, weights=given or "random"), jax.set_mesh(run.mesh):
        if not given:
            return jax.jit(partial(fresh_state, run.cfg), out_shardings=shardings)()
        if jax.process_index() == 0:
            print(f"starts from {given}", flush=True)
        params = pretrained.load(run.path, run.abstract.params)
        make = partial(first_state, run.cfg)
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def _roll_back(
    run: Run, services: RunServices, start: ResumePoint, problem: SkippedTooMany
) -> ResumePoint:
    """A start before the skipped steps, without their data; raises `Diverged` the second time."""
    most, first_bad = len(problem.bad), problem.step - len(problem.bad) + 1
    skipped_range = (
        min(problem.bad),
        data.advance(max(problem.bad), run.cfg.batch_size, start.skipped_ranges),
    )
    message = (
        f"optim.max_skipped_steps={run.cfg.optim.max_skipped_steps}: the loss or gradient was not "
        f"finite in {most} steps in a row, {first_bad} to {problem.step}, sequences "
        f"{skipped_range[0]} to {skipped_range[1] - 1}"
    )
    if start.rolled_back:
        services.events.write("stop", step=problem.step, reason="diverged")
        raise Diverged(
            f"{message}, again after one rollback. The checkpoints in {run.path} are older. "
            "Check that data, or lower optim.lr: --config.optim.lr=... --allow_changes=optim.lr "
            "resumes from there"
        )
    checkpoints = services.checkpoints
    step = checkpoints.latest_valid(before=first_bad)
    if step is None:
        # A stop during skipped steps leaves only a newer one, with the same parameters.
        step = checkpoints.latest_valid()
    back = _from(run, services, step)
    services.events.write(
        "rollback", from_step=problem.step, step=step or 0, jumped=list(skipped_range)
    )
    if jax.process_index() == 0:
        print(f"{message}: rolling back to step {step or 0} and skipping this data", flush=True)
    state = dataclasses.replace(back.state, skipped_in_a_row=back.state.skipped_in_a_row * 0)
    return ResumePoint(
        state=state,
        position=back.position,
        skipped_ranges=(*back.skipped_ranges, skipped_range),
        rolled_back=True,
    )


__all__ = ["Diverged", "Stopped", "fit"]
