"""`fit`: assembles a run from its configuration, and the loop. No mathematics lives here."""

import dataclasses
import signal
import time
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mor_jax import data, sharding, workdir
from mor_jax.checkpoint import Checkpoints
from mor_jax.chips import peak_flops
from mor_jax.config import TrainConfig, check
from mor_jax.evaluate import Evaluator
from mor_jax.finish import finish
from mor_jax.flops import flops
from mor_jax.host_memory import keep_freed_memory
from mor_jax.metrics import Metrics, Record
from mor_jax.progress import Meter, Progress
from mor_jax.state import TrainState, abstract_params, logical_axes
from mor_jax.steps import CompiledSteps, abstract_state, fresh_state
from mor_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change from step to step.

    abstract: shapes and shardings of the state.
    """

    cfg: TrainConfig
    path: epath.Path
    mesh: Mesh
    tokenizer: data.Tokenizer
    evaluator: Evaluator
    fingerprint: str
    abstract: TrainState
    steps: CompiledSteps


class Stopped(RuntimeError):
    """A run that ended before its last step; the message says why and how to go on."""


def fit(cfg: TrainConfig, directory: epath.PathLike) -> None:
    """Trains `cfg` in `directory`, from its newest good checkpoint if it has one.

    Everything that can be wrong with the settings, the data and the directory is found before the
    directory is touched. Resuming continues bit for bit.

    Raises:
        ValueError: a setting, the data or the directory does not fit; nothing was changed.
        Stopped: too many steps in a row were not finite, or a signal asked the run to end.
    """
    keep_freed_memory()
    jax.config.update("jax_threefry_partitionable", True)
    cfg.validate()
    path = epath.Path(directory)
    if "://" not in str(directory):
        path = path.expanduser().resolve()
    workdir.check_workdir(path, cfg)
    run = _assemble(cfg, path)
    workdir.claim_workdir(path, cfg)
    with Checkpoints(run.path, cfg.checkpoint) as checkpoints:
        state, position = _start(run, checkpoints)
        layout = _layout(cfg, cfg.batch_size)
        batches = data.train_batches(cfg.data, run.tokenizer, layout, seed=cfg.seed, start=position)
        try:
            _loop(run, state, batches, checkpoints)
        finally:
            batches.close()


def _assemble(cfg: TrainConfig, path: epath.Path) -> Run:
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_rows(mesh, "batch_size", cfg.batch_size, cfg.accumulate)
    sharding.check_rows(mesh, "eval.batch_size", cfg.eval.batch_size)
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), abstract_params(cfg.model))
    abstract = abstract_state(cfg, mesh, placement)
    steps = CompiledSteps(cfg, mesh, abstract)
    if cfg.model.router.capacity_warmup_steps == 0:
        steps.prepare(1)
    tokenizer = data.load_tokenizer(cfg.data.tokenizer)
    data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    _check_completion(cfg, tokenizer)
    layout = _layout(cfg, cfg.eval.batch_size)
    heldout = data.heldout_batches(cfg.data, tokenizer, layout, cfg.eval.batches)
    evaluator = Evaluator.of(cfg, [place(mesh, batch) for batch in heldout])
    fingerprint = data.fingerprint(cfg.data, tokenizer)
    return Run(cfg, path, mesh, tokenizer, evaluator, fingerprint, abstract, steps)


def _layout(cfg: TrainConfig, rows: int) -> data.Layout:
    """Global batches of `rows` rows, and the part of them that this process reads."""
    host, hosts = jax.process_index(), jax.process_count()
    return data.Layout(length=cfg.length, batch_size=rows, host=host, hosts=hosts)


def _check_completion(cfg: TrainConfig, tokenizer: data.Tokenizer) -> None:
    """Raises `ValueError` if the sample at the end of the run would be longer than a row may be."""
    room = cfg.model.max_length - len(tokenizer.encode(cfg.eval.prompt))
    rule = f"with eval.prompt it exceeds model.max_length={cfg.model.max_length}"
    wanted, fix = cfg.eval.completion_tokens, f"Use at most {max(room, 0)}"
    check(wanted <= max(room, 0), "eval.completion_tokens", wanted, rule, fix)


def place(mesh: Mesh, batch: Batch) -> Batch:
    """This host's rows -> the global batch on the devices."""
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(partial(jax.make_array_from_process_local_data, rows), batch)


def _start(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The state to start from and the number of the next batch."""
    if checkpoints.latest_valid() is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
        return jax.jit(partial(fresh_state, run.cfg), out_shardings=shardings)(), 0
    restored = checkpoints.restore(_fields(run.abstract), fingerprint=run.fingerprint)
    return TrainState(**restored.state), restored.position


def _fields(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _loop(
    run: Run, state: TrainState, batches: data.TrainBatches, checkpoints: Checkpoints
) -> None:
    cfg, first, began = run.cfg, int(state.step), time.perf_counter()
    meter = _meter(run)
    with (
        jax.set_mesh(run.mesh),
        Metrics(run.path, cfg.log, config=cfg.to_dict(), start_step=first) as metrics,
        Progress(cfg.steps, meter) as progress,
        _Signals() as signals,
    ):
        evaluated: dict[str, Any] = {}
        for step in range(first + 1, cfg.steps + 1):
            state, scalars = run.steps(step)(state, place(run.mesh, next(batches)))
            host = {"tokens_per_second": meter.tokens_per_second or 0.0}
            _report(run, progress, metrics.push(step, scalars, host))
            due = _due(step, cfg.eval.every, cfg.steps)
            if due or step == cfg.steps:
                _report(run, progress, metrics.flush())
                with progress.busy("evaluating"):
                    evaluated = run.evaluator(state.params)
                metrics.write(step, {f"eval/{name}": v for name, v in evaluated.items()})
            if signals.caught or _due(step, cfg.checkpoint.every, cfg.steps) or step == cfg.steps:
                extra = {"fingerprint": run.fingerprint}
                checkpoints.save(step, _fields(state), batches.position, cfg.to_dict(), extra)
            if signals.caught:
                raise Stopped(_farewell(run, signals.caught, step))
        evaluated = evaluated or run.evaluator(state.params)
    finish(run, state, evaluated, meter, (first, began))


def _due(step: int, every: int | None, steps: int) -> bool:
    return every is not None and step % every == 0 and step < steps


def _meter(run: Run) -> Meter:
    peak = peak_flops(jax.devices()[0].device_kind)
    return Meter(
        run.cfg.batch_size * run.cfg.length,
        flops_per_token=flops(run.cfg.model, run.cfg.length).training(),
        peak_flops=None if peak is None else peak * jax.device_count(),
    )


def _report(run: Run, progress: Progress, record: Record | None) -> None:
    """Shows a fetched step. Raises `Stopped` after too many skipped ones in a row."""
    if record is None:
        return
    shares: Any = record.values.get("depth_share", ())
    progress.update(record.step, float(record.values["ce"]), shares)
    skipped, most = record.values["skipped_in_a_row"], run.cfg.optim.max_skipped_steps
    if skipped:
        progress.note(f"step {record.step}: loss or gradient not finite, update skipped")
    if skipped >= most:
        raise Stopped(
            f"optim.max_skipped_steps={most}: the loss or gradient was not finite in {skipped:.0f} "
            f"steps in a row, the last one {record.step}. The checkpoints in {run.path} are as "
            "before. Lower optim.lr or look at the data around that step"
        )


def _farewell(run: Run, caught: str, step: int) -> str:
    return f"{caught}: stopped after step {step}, saved in {run.path}. The same command goes on"


class _Signals:
    """Notes SIGINT and SIGTERM, so that a step can be finished and saved first."""

    def __enter__(self) -> "_Signals":
        self.caught = ""
        kinds = (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, kind: int, _: Any) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = signal.Signals(kind).name


__all__ = ["Run", "Stopped", "fit", "place"]
