"""The configuration recorded in a run directory, to start or resume its run: DIR after the colon.

    mor train --config=from_workdir:runs/smollm2 --workdir=runs/smollm2 \\
      --config.steps=1000 --config.optim.lr=3e-4

DIR is the directory of a run, or of imported weights.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from mor_jax.configs.common import train, vanilla_model

from mor_jax.config.old_names import translated

_FIX = "Write --config=from_workdir:DIR with the directory of a run"


def get_config(arg: str = "") -> ConfigDict:
    """The settings in `config.json` of the directory `arg`, locked.

    Raises:
        ValueError: `arg` is not such a directory.
    """
    # Any configuration defines which settings exist and which of them can be None.
    cfg = train(vanilla_model("debug"), "debug")
    with cfg.unlocked():
        fill(cfg, _read(arg))
    return cfg


def _read(arg: str) -> dict[str, Any]:
    file = Path(arg).expanduser() / "config.json"
    if not arg or not file.is_file():
        raise ValueError(f"config argument {arg!r}: {file} does not exist. {_FIX}")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"config argument {arg!r}: {file} is damaged ({error}). {_FIX}") from error
    if not isinstance(settings, dict) or not {"model", "optim", "data"} <= settings.keys():
        raise ValueError(f"config argument {arg!r}: {file} is not of a run. {_FIX}")
    return translated(settings)


def fill(cfg: ConfigDict, values: dict[str, Any]) -> None:
    """Sets the values of a JSON configuration in `cfg`, group by group."""
    for name, value in values.items():
        group = cfg.get(name)
        if isinstance(value, dict) and isinstance(group, ConfigDict):
            fill(group, value)
        else:
            # JSON has no tuples, and settings have no lists.
            cfg[name] = tuple(value) if isinstance(value, list) else value
