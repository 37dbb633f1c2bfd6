"""The configuration of one run of a study: STUDY/RUN after the colon.

    python launch/train.py --config=configs/from_study.py:studies/small/mor-2-w64-3e12-s0 \\
      --workdir=studies/small/runs/mor-2-w64-3e12-s0

STUDY is a directory that `launch/isoflop.py plan` wrote, which has a `manifest.json`. Usually
`launch/isoflop.py run` gives these commands.
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from mor_jax.configs.common import plain_model, train
from mor_jax.configs.from_workdir import fill

from mor_jax.config.old_names import translated, translated_paths
from mor_jax.config.parsing import changed
from mor_jax.scaling.study.seal import digest

_FIX = "Write --config=configs/from_study.py:STUDY/RUN, as launch/isoflop.py run does"


def get_config(arg: str = "") -> ConfigDict:
    """The settings of the run, locked.

    Raises:
        ValueError: `arg` names no study, or no run of it.
    """
    study, _, name = arg.rpartition("/")
    cfg = train(plain_model("debug"), "debug")
    with cfg.unlocked():
        fill(cfg, _read(arg, epath.Path(study).expanduser() / "manifest.json", name))
        router = cfg.model.router
        if router.kind != "none" and router.capacity_multiple is None:
            # The plan counted the FLOPs of exact capacities, wherever its runs are made.
            router.capacity_multiple = 1
    return cfg


def _read(arg: str, file: epath.Path, name: str) -> dict[str, Any]:
    if not name or not file.exists():
        raise ValueError(f"config argument {arg!r}: there is no file {file}. {_FIX}")
    try:
        manifest = json.loads(file.read_text())
        given = manifest.pop("digest")
        runs = {run["name"]: run["settings"] for run in manifest["runs"]}
        base = manifest["base"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config argument {arg!r}: {file} is damaged ({error}). {_FIX}") from error
    if given != digest(manifest):
        fix = "Plan it again with the same command of launch/isoflop.py; finished runs stay"
        raise ValueError(f"config argument {arg!r}: {file} was changed by hand. {fix}")
    if name not in runs:
        raise ValueError(f"config argument {arg!r}: {file} has no run {name!r}. {_FIX}")
    return changed(translated(base), translated_paths(runs[name]))
