"""The event log of a run, `events.jsonl`: what happened when, over all starts of the run.

One object per line: `event`, `start` (which start of the run, from 1), `clock` (seconds since that
start), `time` (wall clock, for people: nothing is computed from it, so it may jump), and further
values per event. Spans of time carry `seconds`:

start      host, process, devices    assemble  from the command until the run is ready
restore    step, position            fresh     weights: a new state from these weights
compile    step                      steps     first, last, input (seconds waited for batches)
eval       step                      save      step: time the loop waited, not the writing
stall      step: an unusual wait for input, also counted in `steps`
skipped    step, position            rollback  from_step, step, jumped (first batch, end)
changed    setting, old, new         memory    bytes by use
stop       step, reason              end       step
open       position: where reading of the data begins    finish    figures and a sample
"""

import contextlib
import datetime
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from mor_jax.files import end_torn_line, read_json_lines

FILE = "events.jsonl"

FLUSH = 10.0
"""Seconds after which a span of steps is written: the most a killed run loses of its log."""

STALL = 1.0
"""Seconds of waiting for one batch that count as a stall."""


class Events:
    """Writes the log of one start, on process 0 only. Durations use the monotonic clock."""

    def __init__(self, workdir: epath.PathLike, began: float):
        """began: monotonic time at which this start of the run began."""
        self._began, self._file, self._start = began, None, 1
        self._reset(time.monotonic())
        if jax.process_index() != 0:
            return
        path = epath.Path(workdir) / FILE
        if path.exists():
            self._start += sum(event["event"] == "start" for event in read(path))
            end_torn_line(path)
        self._file = path.open("a")

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def began(self) -> float:
        """Monotonic time at which this start of the run began."""
        return self._began

    def write(self, event: str, **values: Any) -> None:
        """Writes one event, after the steps before it."""
        self.flush()
        self._line(event, values)

    @contextlib.contextmanager
    def timed(self, event: str, **values: Any) -> Iterator[None]:
        """Writes the event with its `seconds` when the block ends, also by an exception."""
        self.flush()
        begin = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self._line(event, values | {"seconds": end - begin})
            self._mark += end - begin

    def step(self, step: int, waited: float) -> None:
        """Notes that the loop finished `step`, having waited `waited` seconds for its batch."""
        now = time.monotonic()
        if self._first is None:
            self._first = step
        self._last, self._input = step, self._input + waited
        if waited >= STALL:
            self._line("stall", {"step": step, "seconds": waited})
        if now - self._mark >= FLUSH:
            self.flush()

    def restart_clock(self) -> None:
        """Excludes the time since the last event from the steps that follow."""
        self.flush()
        self._reset(time.monotonic())

    def flush(self) -> None:
        """Writes the span of steps noted so far."""
        if self._first is not None:
            now = time.monotonic()
            values = {
                "first": self._first,
                "last": self._last,
                "seconds": max(now - self._mark - self._input, 0.0),
                "input": self._input,
            }
            self._line("steps", values)
            self._reset(now)

    def _reset(self, now: float) -> None:
        # _mark: start of the current span of steps, moved forward by what is timed inside it.
        self._mark, self._input = now, 0.0
        self._first: int | None = None
        self._last = 0

    def _line(self, event: str, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        wall = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
        head = {
            "event": event,
            "start": self._start,
            "clock": time.monotonic() - self._began,
            "time": wall.isoformat(timespec="seconds"),
        }
        rounded = {
            k: round(v, 4) if isinstance(v, float) else v for k, v in (head | values).items()
        }
        self._file.write(json.dumps(rounded) + "\n")
        self._file.flush()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The events of a run, in order; lines truncated by a killed process are skipped."""
    path = epath.Path(path)
    lines = read_json_lines(path, torn="any") if path.exists() else ()
    return [event for _, event in lines if isinstance(event, dict) and "event" in event]
