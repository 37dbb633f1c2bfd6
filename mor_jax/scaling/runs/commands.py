"""The training command of each run of a study, which every way of running it uses."""

from collections.abc import Sequence

from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.config.parsing import check
from mor_jax.scaling.runs.collect import directory
from mor_jax.scaling.study.manifest import Manifest, Run

Family = tuple[Run, ...]


_RESULT = ("steps", "eval", "checkpoint.keep_steps", "checkpoint.max_to_keep")
"""Free in a run of one's own, but in a study they decide on results or on what later runs need."""


def arguments(
    study: epath.PathLike, manifest: Manifest, run: Run, settings: Sequence[str] = ()
) -> list[str]:
    """Arguments of `launch/train.py`; safe to give again, whatever became of the run before.

    settings: further ones, `--config.NAME=VALUE`, see `check_settings`.
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
    """Raises `ValueError` unless all of `words` set what leaves a run's result as it is."""
    for word in words:
        setting, _, value = word.removeprefix("--config.").partition("=")
        free = run_dir.is_free(setting) and not run_dir.is_within(setting, _RESULT)
        rule = "decides on the result, so it belongs to the plan"
        fix = "Plan a study with it; run takes mesh, sharding, log, grad_accum_steps, "
        fix += "model.remat, ..."
        check(free, f"config.{setting}", value, rule, fix)


def families(runs: Sequence[Run]) -> list[Family]:
    """Runs that go on from one another, in that order; families do not depend on one another."""
    found: dict[str, list[Run]] = {}
    root: dict[str, str] = {}
    for run in runs:
        root[run.name] = root.get(run.source or "", run.name)
        found.setdefault(root[run.name], []).append(run)
    return [tuple(family) for family in found.values()]


def chosen(manifest: Manifest, only: Sequence[str]) -> list[Run]:
    """Runs of the architectures and sizes in `only`, runs named there, and those they go on from.

    Nothing of a kind named: all of that kind.

    Raises:
        ValueError: a word names nothing of the study.
    """
    for word in only:
        known = {name for run in manifest.runs for name in (run.name, run.architecture, run.size)}
        rule = "is no run, architecture or size of the study"
        check(word in known, "only", word, rule, f"There are {', '.join(sorted(known))}")
    words = set(only)
    architectures = words & {run.architecture for run in manifest.runs}
    sizes = words & {run.size for run in manifest.runs}
    grouped = bool(architectures or sizes or not only)
    wanted = {
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
        if run.name in wanted and run.source is not None:
            wanted.add(run.source)
    return [run for run in manifest.runs if run.name in wanted]


__all__ = ["Family", "arguments", "check_settings", "chosen", "families"]
