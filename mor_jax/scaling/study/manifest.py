"""The manifest of a study: all its runs with all their settings.

`manifest.json` in the study's directory. Settings are written as differences from one base, so
that people can read them. A digest of the whole file detects edits.
"""

import dataclasses
import json
from typing import Any

from etils import epath

from mor_jax.config import TrainConfig
from mor_jax.config.old_names import translated, translated_command, translated_paths
from mor_jax.config.parsing import check, fail, flatten_settings, with_settings
from mor_jax.files import write_atomic
from mor_jax.scaling.study.manifest_digest import digest
from mor_jax.training.resolved_settings import resolve_settings

FILE = "manifest.json"
FORMAT = 1

_LEFT = {
    f"{FILE}.draft",
    f"{FILE}.damaged",
    "results.jsonl",
    "runs",
    "logs",
    "lock",
    "compilation_cache",
    "fit.json",
    "report",
}
"""What may remain of a study that lost its manifest."""


class Damaged(ValueError):
    """A manifest differs from what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study.

    budget, flops, flops_per_token: in the study's unit; `training_flops_per_token` always as
    `flops.FlopReport.training`. unique, effective: parameters without embedding and head. source,
    source_step: the run and step that this one resumes from; None: from random weights.
    device_hours: expected, of the run's own steps. settings: differences from the study's base.
    """

    name: str
    architecture: str
    size: str
    budget: float
    seed: int
    steps: int
    tokens: int
    flops: float
    flops_per_token: float
    training_flops_per_token: float
    unique: int
    effective: int
    source: str | None
    source_step: int
    device_hours: float | None
    settings: dict[str, Any]

    @property
    def own_steps(self) -> int:
        """Steps that this run computes itself."""
        return self.steps - self.source_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A study. unit: what its FLOPs count, see `study.budgets`. rules: how settings were derived.

    base: a complete configuration as plain values. code: version and commit that planned it.
    reproduce: commands that repeat the study.
    """

    study: str
    unit: str
    rules: dict[str, Any]
    code: dict[str, Any]
    base: dict[str, Any]
    runs: tuple[Run, ...]
    reproduce: tuple[str, ...] = ()

    def run(self, name: str) -> Run:
        """Raises `ValueError` if the study has no such run."""
        for run in self.runs:
            if run.name == name:
                return run
        names = [run.name for run in self.runs]
        fail("run", name, f"the study {self.study} has no such run", f"Choose one of {names}")

    def config(self, run: Run) -> TrainConfig:
        """The complete configuration of a run; capacities that it leaves unset are exact."""
        return resolve_settings(TrainConfig.from_dict(self.values(run)), "cpu")

    def values(self, run: Run) -> dict[str, Any]:
        """The same as nested plain values."""
        return with_settings(self.base, run.settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with format and digest."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        values = json.loads(json.dumps(values))
        return values | {"digest": digest(values)}


def write(study: epath.PathLike, manifest: Manifest) -> bool:
    """Writes the manifest of a new study, or of one that it extends. Returns whether it is new.

    A study may be planned again with more runs; its earlier runs must stay as they were, because
    their results are, or will be, in the directory. A damaged manifest is renamed to
    `manifest.json.damaged`; results and directories are compared with the new one when they are
    read.

    Raises:
        ValueError: the directory holds another study, or something else.
    """
    path = epath.Path(study)
    if not (path / FILE).exists():
        rule = "exists and is not a study directory"
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        free = not path.exists() or (path.is_dir() and names <= _LEFT)
        check(free, "study", str(path), rule, "Choose a new directory")
        path.mkdir(parents=True, exist_ok=True)
        _write(path, manifest)
        return True
    try:
        existing = read(path)
    except Damaged:
        (path / FILE).rename(path / f"{FILE}.damaged")
        _write(path, manifest)
        return True
    differences = _differences(existing, manifest)
    rule = (
        "contains another study: "
        + "; ".join(differences[:5])
        + ("; ..." if differences[5:] else "")
    )
    check(not differences, "study", str(path), rule, "Plan into a new directory; these runs stay")
    if existing.to_dict()["runs"] != manifest.to_dict()["runs"]:
        _write(path, manifest)
    return False


def _write(path: epath.Path, manifest: Manifest) -> None:
    write_atomic(path / FILE, json.dumps(manifest.to_dict(), indent=1) + "\n")


def read(study: epath.PathLike) -> Manifest:
    """The manifest of a study.

    Raises:
        Damaged: it was edited after it was planned.
        ValueError: it does not exist, or has another version.
    """
    file = epath.Path(study) / FILE
    fix = "Plan it first: mor isoflop plan"
    check(file.exists(), "study", str(study), f"is not a study directory: it has no {FILE}", fix)
    fix = "Plan it again with the same command; finished runs stay"
    try:
        values = json.loads(file.read_text())
        recorded, format_ = values.pop("digest"), values["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"is damaged ({type(error).__name__}: {error})"
        raise Damaged(f"manifest={str(file)!r}: {rule}. {fix}") from error
    rule = f"has format {format_}, this version reads {FORMAT}"
    check(format_ == FORMAT, "manifest", str(file), rule, "Use the version that planned it")
    if recorded != digest(values):
        rule = "was edited after it was planned, so its finished runs may not match it"
        raise Damaged(f"manifest={str(file)!r}: {rule}. {fix}")
    del values["format"]
    try:
        values["base"] = translated(values["base"])
        runs = tuple(
            Run(**run | {"settings": translated_paths(run["settings"])})
            for run in values.pop("runs")
        )
        reproduce = tuple(map(translated_command, values.pop("reproduce", ())))
        return Manifest(runs=runs, reproduce=reproduce, **values)
    except (KeyError, TypeError) as error:
        rule = f"has other fields than this version writes ({type(error).__name__}: {error})"
        fail("manifest", str(file), rule, "Use the version that planned it")


def _differences(old: Manifest, new: Manifest) -> list[str]:
    if old.unit != new.unit:
        return [f"its FLOPs are counted as {old.unit!r}, now as {new.unit!r}"]
    runs = {run.name: run for run in new.runs}
    differences = []
    for run in old.runs:
        if run.name not in runs:
            differences.append(f"run {run.name} is not in the new plan")
            continue
        before, after = (
            flatten_settings(old.values(run)),
            flatten_settings(new.values(runs[run.name])),
        )
        differing = sorted(key for key in before | after if before.get(key) != after.get(key))
        for key in differing:
            differences.append(f"{run.name}: {key} was {before.get(key)!r}, now {after.get(key)!r}")
    return differences


__all__ = ["FILE", "Damaged", "Manifest", "Run", "read", "write"]
