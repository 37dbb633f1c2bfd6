"""Profiler traces and memory use of a run."""

import resource
import sys
from typing import Any

import jax
from etils import epath

from mor_jax.config import ProfileConfig

DIRECTORY = "profile"


class Profile:
    """Records a trace of the steps that `profile.steps` names into `<workdir>/profile`."""

    def __init__(self, workdir: epath.Path, cfg: ProfileConfig):
        self._path, self._steps, self._on = workdir / DIRECTORY, cfg.steps, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts the trace at its first step, or where a run resumes inside its steps."""
        if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._path))
            self._on = True

    def after(self, step: int, results: Any) -> str:
        """Ends the trace once the last step is computed; then returns a line with its path."""
        if not self._on or self._steps is None or step < self._steps[1]:
            return ""
        jax.block_until_ready(results)
        self._stop()
        first, last = self._steps
        return f"trace of steps {first} to {last} in {self._path}"

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes by use: of the compiled step on each device, of this device, of this process.

    arguments: state and batch. temporaries: further buffers while a step runs. device_*: where the
    platform reports them. host: peak resident size so far.
    """
    report: dict[str, int] = {}
    analysis = program.memory_analysis()
    if analysis is not None:
        report["arguments"] = analysis.argument_size_in_bytes
        report["temporaries"] = analysis.temp_size_in_bytes
        report["program"] = analysis.generated_code_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_used", "peak_bytes_in_use": "device_peak"}
    names["bytes_limit"] = "device_limit"
    report |= {ours: stats[theirs] for theirs, ours in names.items() if theirs in stats}
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    report["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return report


def memory_line(report: dict[str, int]) -> str:
    """One log line, `memory per device: ...`, in MiB."""
    words = {
        "arguments": "state and batch",
        "temporaries": "temporary buffers",
        "device_peak": "peak device memory",
        "device_limit": "device memory",
        "host": "peak host memory",
    }
    parts = [f"{words[k]} {v / 2**20:,.0f} MiB" for k, v in report.items() if k in words]
    return "memory per device: " + ", ".join(parts)
