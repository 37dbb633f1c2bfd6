"""Evaluation results as JSON lines: one for each checkpoint and request."""

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
    """Lines with `step`, `time` (seconds since 1970), `asked` (the request) and the results.

    An incomplete last line, left by a killed process, is ignored.
    """

    def __init__(self, path: epath.PathLike, asked: Mapping[str, Any]) -> None:
        """asked: JSON values that identify this request among others in the same file.

        Raises `ValueError` if the file has other contents, or its directory does not exist.
        """
        self.path = epath.Path(path)
        self.asked = json.loads(json.dumps(asked))
        fix = "Choose a file in an existing directory"
        check(self.path.parent.is_dir(), "output", str(path), "its directory does not exist", fix)
        check(not self.path.is_dir(), "output", str(path), "is a directory", fix)
        # Reading a device may never end.
        plain = not self.path.exists() or "://" in str(path) or Path(path).is_file()
        check(plain, "output", str(path), "is not a regular file", fix)
        self.steps()

    def steps(self) -> set[int]:
        """Steps with results of this request. Raises `ValueError` on lines of another kind."""
        return {record["step"] for record in self._read() if record["asked"] == self.asked}

    def append(self, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """Appends a line and syncs it to disk. Raises `ValueError` if it cannot be written."""
        record = {"step": step, "time": time.time(), "asked": self.asked, **found}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            self._add(line)
        except OSError as error:
            fix = "Choose another --output, or free disk space"
            fail("output", str(self.path), f"cannot be written ({error})", fix)
        return record

    def _add(self, line: str) -> None:
        if "://" in str(self.path):
            # Object stores cannot append: the whole file is replaced.
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
        # In a file of another kind every line looks torn.
        for number, record in read_json_lines(self.path, torn="any"):
            ok = isinstance(record, dict) and type(record.get("step")) is int
            if not (ok and isinstance(record.get("asked"), dict)):
                rule = f"line {number} is not a record of an evaluation"
                fail("output", str(self.path), rule, "Choose another --output")
            found.append(record)
        rule = "has other contents than records of evaluations"
        check(
            bool(found) or not self.path.read_bytes().strip(),
            "output",
            str(self.path),
            rule,
            "Choose another --output",
        )
        return found
