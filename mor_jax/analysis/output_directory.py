"""The directory of an analysis: whole or not there, and never in place of what it is not."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.files import added_or_changed, fresh_directory, stamps

FILE = "analysis.json"
"""What was asked and what came of it; its presence marks the directory of an analysis."""

Write = str | Callable[[Path], None]
"""Contents of a file, or what writes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisOutput:
    """Where an analysis goes.

    path: its directory. asked: what it depends on; the same question replaces its older answer.
    overwrite: answers to other questions about the same run may be replaced too.
    """

    path: Path
    asked: Mapping[str, Any]
    overwrite: bool = False

    @classmethod
    def of(
        cls, output: str | None, asked: Mapping[str, Any], default: str, overwrite: bool
    ) -> "AnalysisOutput":
        """At `output`, or at `<workdir>/analysis/<default>`; asked["workdir"] is the run's.

        Raises `ValueError` where that is no local path, or something else is there.
        """
        path = f"{asked['workdir']}/analysis/{default}" if output is None else output
        fix = "Give --output=DIR on this machine"
        check("://" not in path, "output", path, "must be a local directory", fix)
        place = cls(path=Path(path).expanduser(), asked=asked, overwrite=overwrite)
        place.check_free()
        return place

    def check_free(self, there: Path | None = None) -> None:
        """Raises `ValueError` if what is there is not all of an analysis of the same run.

        A file, another directory, another run's analysis, and files that were added to an analysis
        or changed since.
        """
        path, fix = there or self.path, "Give another --output"
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        check(path.is_dir(), "output", str(path), "is a file", fix)
        try:
            recorded = json.loads((path / FILE).read_text())
            asked, owner = recorded["asked"], recorded["asked"]["workdir"]
            # Earlier releases kept names alone.
            made = recorded.get("stamps") or dict.fromkeys(recorded["files"])
        except (OSError, ValueError, TypeError, KeyError):
            rule = "is there and holds no analysis; it is not replaced"
            fail("output", str(path), rule, fix)
        rule = f"holds an analysis of {owner}; it is not replaced"
        check(owner == self.asked["workdir"], "output", str(path), rule, fix)
        names = sorted(asked.keys() | self.asked.keys())
        other = [name for name in names if asked.get(name) != self.asked.get(name)]
        rule = f"holds another analysis ({', '.join(other)} differ); it is not replaced"
        fix = "Give another --output, or --overwrite"
        check(not other or self.overwrite, "output", str(path), rule, fix)
        added = added_or_changed(path, made, FILE)
        rule = f"holds what no analysis made: {', '.join(added[:10])}; it is not replaced"
        check(not added, "output", str(path), rule, "Move that away, or give another --output")

    def write(self, facts: Mapping[str, Any], files: Mapping[str, Write]) -> list[Path]:
        """Writes all files beside the place and moves them there together; their paths.

        facts: JSON values for analysis.json. Raises `ValueError` where nothing can be written.
        """
        record = {"asked": dict(self.asked), **facts, "files": sorted(files)}
        try:
            with fresh_directory(self.path, self.check_free) as draft:
                for name, contents in files.items():
                    if isinstance(contents, str):
                        (draft / name).write_text(contents, encoding="utf-8")
                    else:
                        contents(draft / name)
                record["stamps"] = stamps(draft, FILE)
                (draft / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            fail("output", str(self.path), f"cannot be written ({error})", "Give another --output")
        return [self.path / name for name in files]


def json_lines(records: list[dict[str, Any]]) -> str:
    """A JSON object a line."""
    return "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    )


def number(value: Any, digits: int = 6) -> float | None:
    """A float for JSON with so many significant digits; None where it is not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") if value - value == 0 else None
