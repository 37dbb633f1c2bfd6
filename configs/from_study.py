"""The configuration of one run of a study: STUDY/RUN after the colon.

    mor train --config=from_study:studies/small/mor-2-w64-3e12-s0 \\
      --workdir=studies/small/runs/mor-2-w64-3e12-s0

STUDY is a directory with a `manifest.json`, written by `mor isoflop plan`. Usually
`mor isoflop run` generates these commands.
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from mor_jax.configs.common import train, vanilla_model
from mor_jax.configs.from_workdir import fill

from mor_jax.config.old_names import translated, translated_paths
from mor_jax.config.parsing import with_settings
from mor_jax.scaling.study.manifest_digest import digest

_FIX = "Write --config=from_study:STUDY/RUN, as mor isoflop run does"


def get_config(arg: str = "") -> ConfigDict:
    """The settings of the run, locked.

    Raises:
        ValueError: the study or the run in `arg` does not exist.
    """
    study, _, name = arg.rpartition("/")
    cfg = train(vanilla_model("debug"), "debug")
    with cfg.unlocked():
        fill(cfg, _read(arg, epath.Path(study).expanduser() / "manifest.json", name))
        router = cfg.model.router
        if router.kind != "none" and router.capacity_multiple is None:
            # The plan counted the FLOPs of exact capacities, so no device may round them.
            router.capacity_multiple = 1
    return cfg


def _read(arg: str, file: epath.Path, name: str) -> dict[str, Any]:
    if not name or not file.exists():
        raise ValueError(f"config argument {arg!r}: {file} does not exist. {_FIX}")
    try:
        manifest = json.loads(file.read_text())
        recorded = manifest.pop("digest")
        runs = {run["name"]: run["settings"] for run in manifest["runs"]}
        base = manifest["base"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config argument {arg!r}: {file} is damaged ({error}). {_FIX}") from error
    if recorded != digest(manifest):
        fix = "Plan it again with the same command of mor isoflop; finished runs are kept"
        raise ValueError(f"config argument {arg!r}: {file} was edited. {fix}")
    if name not in runs:
        raise ValueError(f"config argument {arg!r}: {file} has no run {name!r}. {_FIX}")
    return with_settings(translated(base), translated_paths(runs[name]))
