"""Hands a study to Slurm, as one array, or to GKE, through the launchers of single runs.

A task of the array, or a workload, is a family: the runs that go on from one another, in order.
Families do not depend on one another. Whatever is done already is left out, so the same command
submits what is left; a run that is started twice keeps its directory to itself.
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
from mor_jax.scaling.runs.commands import Family, arguments, check_settings, chosen, families
from mor_jax.scaling.study.manifest import Manifest

_LAUNCHERS = {"slurm": "launch/slurm/submit.sh", "gke": "launch/gke/xpk.sh"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where to run. where: `slurm` or `gke`. flags: of the launcher there, `--dry_run` among them.

    only, settings: see `commands.chosen`, `commands.check_settings`. root: of the repository, which
    every node sees or the image holds.
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
    """Submits the families that have something left to do; returns what was said.

    Raises:
        ValueError: nothing is left, or the launcher refuses.
    """
    names = {run.name for run in chosen(manifest, to.only)}
    found = progress(study, manifest)
    done = {each.run.name for each in found if each.state == "done"}
    every = families([run for run in manifest.runs if run.name in names])
    todo = [family for family in every if {run.name for run in family} - done]
    rule = "has no run left to do"
    check(bool(todo), "study", str(study), rule, "See python launch/isoflop.py status")
    folder = _lists(study, manifest, to, todo)
    launcher = str(to.root / _LAUNCHERS[to.where])
    if to.where == "slurm":
        array = [f"--array=0-{len(todo) - 1}", f"--runs={folder.resolve()}"]
        return [_call([launcher, *to.flags, *array], to.root)]
    told = []
    for number, family in enumerate(todo):
        own = [f"--workload={_workload(manifest.study, family)}"]
        own += [f"--runs={(folder / f'{number}.runs').resolve()}"]
        told.append(_call([launcher, *to.flags, *own], to.root))
    return told


def _lists(study: epath.PathLike, manifest: Manifest, to: Cluster, todo: Sequence[Family]) -> Path:
    """A new directory with the trainings of each family, a line each.

    Tasks that were submitted before may still be waiting for theirs. The launchers read the lists
    here, wherever the study is.
    """
    remote = "://" in str(study)
    there = study if remote else Path(study).resolve()
    base = Path(tempfile.mkdtemp()) if remote else Path(study) / to.where
    folder = base / str(len(list(base.iterdir())) if base.exists() else 0)
    folder.mkdir(parents=True)
    for number, family in enumerate(todo):
        each = [arguments(there, manifest, run, to.settings) for run in family]
        lines = [" ".join(_quoted(words)) for words in each]
        (folder / f"{number}.runs").write_text("".join(f"{line}\n" for line in lines))
    return folder


def _workload(study: str, family: Family) -> str:
    """A name that the cluster takes, the same at every call: at most 40 letters, digits, -."""
    first = family[0]
    name = f"{study}-{first.architecture}-{first.size}-s{first.seed}"
    mark = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')[:32].strip('-')}-{mark}"


def _quoted(words: Sequence[str]) -> list[str]:
    for word in words:
        rule = "a line of a list of runs is read as words, so it may hold no spaces or quotes"
        ok = re.fullmatch(r"[A-Za-z0-9_./:=,@%+-]+", word) is not None
        check(ok, "study", word, rule, "Give the study a directory with a plainer name")
    return list(words)


def _call(command: list[str], root: Path) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    rule = f"{Path(command[0]).name} ended with exit code {done.returncode}: {said[-800:]}"
    check(done.returncode == 0, "launcher", command[1:], rule, "Its --help lists the flags")
    return said


__all__ = ["Cluster", "submit"]
