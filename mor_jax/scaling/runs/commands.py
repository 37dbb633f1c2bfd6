"""The training command of each run of a study, for local runs and clusters."""

from collections.abc import Sequence

from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.config.parsing import check
from mor_jax.scaling.runs.collect import directory
from mor_jax.scaling.study.manifest import Manifest, Run

Family = tuple[Run, ...]


_RESULT = ("steps", "eval", "checkpoint.keep_steps", "checkpoint.max_to_keep")
"""Settings that may change in other runs, but in a study affect results or later runs."""


def arguments(
    study: epath.PathLike, manifest: Manifest, run: Run, settings: Sequence[str] = ()
) -> list[str]:
    """Arguments of `mor train`. They also resume a run that was interrupted.

    settings: additional `--config.NAME=VALUE`, see `check_settings`.
    """
    found = [
        f"--config=configs/from_study.py:{study}/{run.name}",
        f"--workdir={directory(study, run)}",
    ]
    if run.source is not None:
        source = directory(study, manifest.run(run.source))
        found.append(f"--branch={source}@{run.source_step}")
    return [*found, *settings]


def check_settings(words: Sequence[str]) -> None:
    """Raises `ValueError` if one of `words` sets a setting that changes a run's result."""
    for word in words:
        setting, _, value = word.removeprefix("--config.").partition("=")
        free = run_dir.is_free(setting) and not run_dir.is_within(setting, _RESULT)
        rule = "changes the result, so it belongs to the plan"
        fix = "Plan a study with it; run accepts mesh, sharding, log, grad_accum_steps, "
        fix += "model.remat, ..."
        check(free, f"config.{setting}", value, rule, fix)


def families(runs: Sequence[Run]) -> list[Family]:
    """Groups runs that continue one another, in that order; families are independent."""
    found: dict[str, list[Run]] = {}
    root: dict[str, str] = {}
    for run in runs:
        root[run.name] = root.get(run.source or "", run.name)
        found.setdefault(root[run.name], []).append(run)
    return [tuple(family) for family in found.values()]


def selected(manifest: Manifest, only: Sequence[str]) -> list[Run]:
    """Runs that match `only`, and the runs that they continue.

    only: names of architectures, sizes or runs. Without an architecture all architectures match,
    without a size all sizes.

    Raises:
        ValueError: a word is not the name of an architecture, size or run of the study.
    """
    for word in only:
        known = {name for run in manifest.runs for name in (run.name, run.architecture, run.size)}
        rule = "not a run, architecture or size of the study"
        check(word in known, "only", word, rule, f"Choose from {', '.join(sorted(known))}")
    words = set(only)
    architectures = words & {run.architecture for run in manifest.runs}
    sizes = words & {run.size for run in manifest.runs}
    grouped = bool(architectures or sizes or not only)
    names = {
        run.name
        for run in manifest.runs
        if run.name in words
        or (
            grouped
            and (not architectures or run.architecture in architectures)
            and (not sizes or run.size in sizes)
        )
    }
    for run in reversed(manifest.runs):
        if run.name in names and run.source is not None:
            names.add(run.source)
    return [run for run in manifest.runs if run.name in names]


__all__ = ["Family", "arguments", "check_settings", "families", "selected"]
