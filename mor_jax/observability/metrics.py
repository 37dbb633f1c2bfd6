"""Metrics of a run: from scalars on a device to `metrics.jsonl`, TensorBoard, Weights & Biases.

`metrics.jsonl` is always written: one object per line with `step`, `time` (seconds since 1970) and
named values, each a number or a list of numbers. Values that JSON cannot represent are written as
the strings "NaN", "Infinity", "-Infinity"; `read` converts them back.
"""

import json
import math
import time
import uuid
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from etils import epath

from mor_jax.config import LogConfig
from mor_jax.config.parsing import fail
from mor_jax.files import read_json_lines, write_atomic

FILE = "metrics.jsonl"

Value = float | list[float]
_STRINGS = ("NaN", "Infinity", "-Infinity")


class Record(NamedTuple):
    """Values of one step as plain numbers; a vector becomes a list."""

    step: int
    values: dict[str, Value]


class Tracker(Protocol):
    """Writes records somewhere. `close` makes them durable."""

    def write(self, record: Record) -> None:
        """Writes one record."""

    def close(self) -> None:
        """Flushes and releases its resources."""


class Metrics:
    """Takes the metrics of every step and fetches them one step late.

    Fetching waits until the device has computed them. Fetching the previous step while the next
    one runs keeps the device busy. Only process 0 writes.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        cfg: LogConfig,
        *,
        config: dict[str, Any] | None = None,
        start_step: int = 0,
        again: str | None = None,
    ):
        """Opens the trackers. Records of steps after `start_step` are dropped from the file.

        again: so are records of `start_step` itself that hold names with this prefix, since they
        are written again. config: the resolved configuration, shown by Weights & Biases. Raises
        `ValueError` when a requested tracker is not installed.
        """
        self._every = cfg.interval
        self._pending: tuple[int, Any, dict[str, Any]] | None = None
        self._trackers: list[Tracker] = []
        if jax.process_index() != 0:
            return
        path = epath.Path(workdir)
        if cfg.wandb_project is not None:
            self._trackers.append(_Wandb(path, cfg.wandb_project, config or {}))
        if cfg.tensorboard:
            self._trackers.append(_TensorBoard(path, start_step))
        self._trackers.append(_Jsonl(path, start_step, again))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def push(
        self, step: int, arrays: dict[str, Any], host: dict[str, Any] | None = None
    ) -> Record | None:
        """Takes the metrics of `step`; returns the record of the previous step.

        arrays: scalars or vectors on a device, possibly not computed yet. host: numbers known
        already. A record is written when `step` is the first or a multiple of `cfg.interval`.
        """
        pending, self._pending = self._pending, (step, arrays, host or {})
        return self._fetch(pending)

    def flush(self) -> Record | None:
        """Fetches the pending metrics of the last `push`."""
        pending, self._pending = self._pending, None
        return self._fetch(pending)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes numbers at once, for instance those of an evaluation after `step`."""
        self._write(Record(step, {name: _plain(value) for name, value in values.items()}))

    def close(self) -> None:
        """Writes the last record and closes the trackers. May be called more than once."""
        try:
            self.flush()
        finally:
            trackers, self._trackers = self._trackers, []
            for tracker in trackers:
                tracker.close()

    def _fetch(self, pending: tuple[int, Any, dict[str, Any]] | None) -> Record | None:
        if pending is None:
            return None
        step, arrays, host = pending
        values = {name: _plain(value) for name, value in jax.device_get(arrays).items()}
        record = Record(step, values | {name: _plain(value) for name, value in host.items()})
        if step == 1 or step % self._every == 0:
            self._write(record)
        return record

    def _write(self, record: Record) -> None:
        for tracker in self._trackers:
            tracker.write(record)


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, each with `step`, `time` and its values.

    A last line truncated by a killed process is skipped. Raises `ValueError` with the line
    number on any other that is not a record.
    """
    records = []
    for number, record in read_json_lines(epath.Path(path)):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(
                f"{path}:{number}: not a metrics record: it has no integer step. Remove the line"
            )
        records.append({name: _parse(value) for name, value in record.items()})
    return records


class _Jsonl:
    def __init__(self, workdir: epath.Path, start_step: int, again: str | None):
        path = workdir / FILE
        if path.exists():
            remaining = [record for record in read(path) if record["step"] <= start_step]
            if again is not None:
                remaining = [r for r in remaining if r["step"] < start_step or not _has(r, again)]
            write_atomic(path, "".join(map(_line, remaining)))
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        self._file.write(_line({"step": record.step, "time": time.time()} | record.values))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, workdir: epath.Path, start_step: int):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            fail("log.tensorboard", True, "needs the package tensorboard", _install("tensorboard"))
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = EventFileWriter(str(workdir / "tensorboard"))
        # Tells readers to discard what an earlier start wrote for the steps that run again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.add_event(
            self._event(wall_time=time.time(), step=start_step + 1, session_log=start)
        )

    def write(self, record: Record) -> None:
        scalars = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in _scalars(record.values).items()
        ]
        summary = self._summary(value=scalars)
        self._file.add_event(self._event(wall_time=time.time(), step=record.step, summary=summary))

    def close(self) -> None:
        self._file.close()


class _Wandb:
    def __init__(self, workdir: epath.Path, project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            fail("log.wandb_project", project, "needs the package wandb", _install("wandb"))
        name = workdir / "wandb_id.txt"
        if not name.exists():
            write_atomic(name, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            id=name.read_text(),
            name=workdir.name,
            resume="allow",
            dir=str(workdir),
            config=config,
        )
        # With its own step axis, wandb accepts records of steps that run again after a resume.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log({"step": record.step} | _scalars(record.values))

    def close(self) -> None:
        self._run.finish()


def _install(package: str) -> str:
    return f"Run: pip install {package}"


def _scalars(values: dict[str, Value]) -> dict[str, float]:
    # Trackers draw one curve per number: list members are numbered from 1.
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": member for i, member in enumerate(value, start=1)}
        else:
            flat[name] = value
    return flat


def _has(record: dict[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in record)


def _plain(value: Any) -> Value:
    array = np.asarray(value, np.float64)
    return float(array) if array.ndim == 0 else array.ravel().tolist()


def _line(record: dict[str, Any]) -> str:
    return (
        json.dumps({name: _json(value) for name, value in record.items()}, allow_nan=False) + "\n"
    )


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else _STRINGS[1 + (value < 0)]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        # Counts stay readable: 7, not 7.0.
        return int(value)
    return value


def _parse(value: Any) -> Any:
    if isinstance(value, list):
        return [_parse(member) for member in value]
    return float(value) if value in _STRINGS else value
