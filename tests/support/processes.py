"""Real processes for tests: started, read, ended whatever happens."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import patience
from support.patience import PATIENCE

ROOT = Path(__file__).parents[2]


class Process:
    """A Python process whose output goes to a file, so that it never blocks and can be read."""

    def __init__(self, arguments: list[str], output: Path, **variables: str):
        self._output = output
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text()

    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def code(self) -> int:
        """The exit code, once it has one; fails with the output otherwise."""
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {PATIENCE:g} s:\n{self.output}") from None

    def end(self) -> None:
        if self.running():
            self._process.kill()
            self._process.wait()


def until(ready: Callable[[], Any], processes: list[Process]) -> Any:
    """Waits for `ready()` to be true and returns it; fails when a process ends before."""

    def outputs() -> str:
        return "\n".join(p.output for p in processes)

    def look() -> Any:
        value = ready()
        running = value or all(p.running() for p in processes)
        assert running, f"a process ended early:\n{outputs()}"
        return value

    return patience.until(look, every=0.05, seen=outputs)
