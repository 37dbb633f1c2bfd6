"""The output directory of an analysis: written as a whole, never over files of other origin."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.files import added_or_changed, fresh_directory, stamps

ANALYSIS_FILE = "analysis.json"
"""The request and its totals. A directory with this file is the output of an analysis."""

FileContents = str | Callable[[Path], None]
"""The contents of a file, or a function that writes it to a path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisOutput:
    """The output directory of one analysis.

    path: the directory. request: the options that the result depends on; a repeated request
    replaces its earlier result. overwrite: results of other requests about the same run may be
    replaced too.
    """

    path: Path
    request: Mapping[str, Any]
    overwrite: bool = False

    @classmethod
    def of(
        cls, output: str | None, request: Mapping[str, Any], default: str, overwrite: bool
    ) -> "AnalysisOutput":
        """The directory `output`; by default `<workdir>/analysis/<default>`.

        request["workdir"]: the run's directory. Raises `ValueError` for a path that is not local,
        and as `check_replaceable`.
        """
        path = f"{request['workdir']}/analysis/{default}" if output is None else output
        fix = "Give --output=DIR on this machine"
        check("://" not in path, "output", path, "must be a local directory", fix)
        directory = cls(path=Path(path).expanduser(), request=request, overwrite=overwrite)
        directory.check_replaceable()
        return directory

    def check_replaceable(self, directory: Path | None = None) -> None:
        """Raises `ValueError` unless the path is free or holds an earlier analysis of the same run.

        Refused: a file, any other directory, the analysis of another run, an analysis to which
        files were added or in which files were changed, and, without `overwrite`, the result of
        another request. directory: the one to check, if it was moved from `path`.
        """
        path, fix = directory or self.path, "Give another --output"
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        check(path.is_dir(), "output", str(path), "is a file", fix)
        try:
            recorded = json.loads((path / ANALYSIS_FILE).read_text())
            request, owner = recorded["asked"], recorded["asked"]["workdir"]
            # Earlier releases recorded names without checksums.
            written = recorded.get("stamps") or dict.fromkeys(recorded["files"])
        except (OSError, ValueError, TypeError, KeyError):
            rule = "exists and is not the output of an analysis; it is not replaced"
            fail("output", str(path), rule, fix)
        rule = f"holds an analysis of {owner}; it is not replaced"
        check(owner == self.request["workdir"], "output", str(path), rule, fix)
        names = sorted(request.keys() | self.request.keys())
        differing = [name for name in names if request.get(name) != self.request.get(name)]
        rule = f"holds another analysis ({', '.join(differing)} differ); it is not replaced"
        fix = "Give another --output, or --overwrite"
        check(not differing or self.overwrite, "output", str(path), rule, fix)
        added = added_or_changed(path, written, ANALYSIS_FILE)
        rule = f"holds files that no analysis wrote: {', '.join(added[:10])}; it is not replaced"
        check(not added, "output", str(path), rule, "Move them away, or give another --output")

    def write(self, facts: Mapping[str, Any], files: Mapping[str, FileContents]) -> list[Path]:
        """Writes all files to a temporary directory and renames it to `path`; returns their paths.

        facts: JSON values for analysis.json. Raises `ValueError` if a file cannot be written.
        """
        record = {"asked": dict(self.request), **facts, "files": sorted(files)}
        try:
            with fresh_directory(self.path, self.check_replaceable) as draft:
                for name, contents in files.items():
                    if isinstance(contents, str):
                        (draft / name).write_text(contents, encoding="utf-8")
                    else:
                        contents(draft / name)
                record["stamps"] = stamps(draft, ANALYSIS_FILE)
                (draft / ANALYSIS_FILE).write_text(
                    json.dumps(record, indent=1) + "\n", encoding="utf-8"
                )
        except OSError as error:
            fail("output", str(self.path), f"cannot be written ({error})", "Give another --output")
        return [self.path / name for name in files]


def json_lines(records: list[dict[str, Any]]) -> str:
    """One JSON object per line."""
    return "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    )


def rounded(value: Any, digits: int = 6) -> float | None:
    """The value as a float of `digits` significant digits for JSON; None if it is not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") if value - value == 0 else None
