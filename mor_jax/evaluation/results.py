"""Evaluations as JSON lines: one for each checkpoint and each way to ask."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from mor_jax.config.parsing import check, fail
from mor_jax.files import end_torn_line, read_json_lines

FILE = "evaluations.jsonl"
"""In the run's directory."""


class EvalLog:
    """Lines of `step`, `time` (seconds since 1970), `asked` and what was found.

    A line is written whole or, if the process is killed meanwhile, does not count.
    """

    def __init__(self, path: epath.PathLike, asked: Mapping[str, Any]) -> None:
        """asked: JSON values that tell this question from others in the same file.

        Raises `ValueError` if the file cannot be one of records, or its directory is not there.
        """
        self.path = epath.Path(path)
        self.asked = json.loads(json.dumps(asked))
        fix = "Name a file in a directory that exists"
        check(self.path.parent.is_dir(), "output", str(path), "its directory does not exist", fix)
        check(not self.path.is_dir(), "output", str(path), "is a directory", fix)
        # A device may have no end.
        plain = not self.path.exists() or "://" in str(path) or Path(path).is_file()
        check(plain, "output", str(path), "is no plain file", fix)
        self.steps()

    def steps(self) -> set[int]:
        """Steps that were asked this before. Raises `ValueError` on lines that are no records."""
        return {record["step"] for record in self._read() if record["asked"] == self.asked}

    def append(self, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a line; it is on the disk when this returns. Raises `ValueError` if it cannot."""
        record = {"step": step, "time": time.time(), "asked": self.asked, **found}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            self._add(line)
        except OSError as error:
            fix = "Give another --output, or make room"
            fail("output", str(self.path), f"cannot be written ({error})", fix)
        return record

    def _add(self, line: str) -> None:
        if "://" in str(self.path):
            # Object stores have no appending; what is there is replaced at once.
            before = self.path.read_text() if self.path.exists() else ""
            self.path.write_text(before + line)
            return
        path, new = Path(self.path), not self.path.exists()
        try:
            end_torn_line(self.path)
            with path.open("ab") as file:
                file.write(line.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if new:
                path.unlink(missing_ok=True)
            raise

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        # A file of something else has nothing but lines that look cut short.
        for number, record in read_json_lines(self.path, torn="any"):
            ok = isinstance(record, dict) and type(record.get("step")) is int
            if not (ok and isinstance(record.get("asked"), dict)):
                rule = f"line {number} is no record of an evaluation"
                fail("output", str(self.path), rule, "Name another file")
            found.append(record)
        rule = "holds no record of an evaluation, but something else"
        check(
            bool(found) or not self.path.read_bytes().strip(),
            "output",
            str(self.path),
            rule,
            "Name another",
        )
        return found
