"""Submits a study to Slurm, as one array job, or to GKE, through the launchers of single runs.

A task of the array, or a workload, is a family: runs that continue one another, in order. Families
are independent. Finished runs are skipped, so repeating the command submits what is left. The run
directory's lock keeps a run that is started twice from training twice.
"""

import dataclasses
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from mor_jax.config.parsing import check
from mor_jax.scaling.runs.collect import progress
from mor_jax.scaling.runs.commands import Family, arguments, check_settings, families, selected
from mor_jax.scaling.study.manifest import Manifest

_LAUNCHERS = {"slurm": "launch/slurm/submit.sh", "gke": "launch/gke/xpk.sh"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where to run. where: `slurm` or `gke`. flags: passed to its launcher, such as `--dry_run`.

    only, settings: see `commands.selected`, `commands.check_settings`. root: the repository, on
    storage that all nodes share or in the image.
    """

    where: str
    root: Path
    flags: Sequence[str] = ()
    only: Sequence[str] = ()
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises `ValueError` on a setting that belongs to the plan."""
        check_settings(self.settings)


def submit(study: epath.PathLike, manifest: Manifest, to: Cluster) -> list[str]:
    """Submits the families that have unfinished runs; returns the output of the launcher.

    Raises:
        ValueError: no run is left, or the launcher fails.
    """
    names = {run.name for run in selected(manifest, to.only)}
    found = progress(study, manifest)
    done = {each.run.name for each in found if each.state == "done"}
    every = families([run for run in manifest.runs if run.name in names])
    todo = [family for family in every if {run.name for run in family} - done]
    rule = "has no run left to do"
    check(bool(todo), "study", str(study), rule, "See mor isoflop status")
    folder = _lists(study, manifest, to, todo)
    launcher = str(to.root / _LAUNCHERS[to.where])
    if to.where == "slurm":
        array = [f"--array=0-{len(todo) - 1}", f"--runs={folder.resolve()}"]
        return [_call([launcher, *to.flags, *array], to.root)]
    outputs = []
    for number, family in enumerate(todo):
        own = [f"--workload={_workload(manifest.study, family)}"]
        own += [f"--runs={(folder / f'{number}.runs').resolve()}"]
        outputs.append(_call([launcher, *to.flags, *own], to.root))
    return outputs


def _lists(study: epath.PathLike, manifest: Manifest, to: Cluster, todo: Sequence[Family]) -> Path:
    """Writes the training commands of each family, one per line, into a new directory.

    The directory is new because tasks that were submitted before may still read theirs. It is local
    to the launchers, wherever the study is.
    """
    remote = "://" in str(study)
    location = study if remote else Path(study).resolve()
    base = Path(tempfile.mkdtemp()) if remote else Path(study) / to.where
    folder = base / str(len(list(base.iterdir())) if base.exists() else 0)
    folder.mkdir(parents=True)
    for number, family in enumerate(todo):
        each = [arguments(location, manifest, run, to.settings) for run in family]
        lines = [" ".join(_quoted(words)) for words in each]
        (folder / f"{number}.runs").write_text("".join(f"{line}\n" for line in lines))
    return folder


def _workload(study: str, family: Family) -> str:
    """A valid and reproducible workload name: at most 40 letters, digits and hyphens."""
    first = family[0]
    name = f"{study}-{first.architecture}-{first.size}-s{first.seed}"
    mark = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')[:32].strip('-')}-{mark}"


def _quoted(words: Sequence[str]) -> list[str]:
    for word in words:
        rule = "must not contain spaces or quotes, because lists of runs are split into words"
        ok = re.fullmatch(r"[A-Za-z0-9_./:=,@%+-]+", word) is not None
        check(ok, "study", word, rule, "Give the study a directory with a plainer name")
    return list(words)


def _call(command: list[str], root: Path) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip()
    rule = f"{Path(command[0]).name} ended with exit code {done.returncode}: {output[-800:]}"
    check(done.returncode == 0, "launcher", command[1:], rule, "Its --help lists the flags")
    return output


__all__ = ["Cluster", "submit"]
