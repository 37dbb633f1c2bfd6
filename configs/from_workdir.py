"""The configuration that a directory holds, to start its run or to go on with it: DIR after colon.

    python launch/train.py --config=configs/from_workdir.py:runs/smollm2 --workdir=runs/smollm2 \\
      --config.steps=1000 --config.optim.lr=3e-4

DIR is the directory of a run, or one that an import of weights made.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from mor_jax.configs.common import plain_model, train

from mor_jax.config.old_names import translated

_FIX = "Write --config=configs/from_workdir.py:DIR with the directory of a run"


def get_config(arg: str = "") -> ConfigDict:
    """The settings in `config.json` of the directory `arg`, locked.

    Raises:
        ValueError: `arg` is not such a directory.
    """
    # Any configuration tells which settings exist and which of them can be None.
    cfg = train(plain_model("debug"), "debug")
    with cfg.unlocked():
        fill(cfg, _read(arg))
    return cfg


def _read(arg: str) -> dict[str, Any]:
    file = Path(arg).expanduser() / "config.json"
    if not arg or not file.is_file():
        raise ValueError(f"config argument {arg!r}: there is no file {file}. {_FIX}")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"config argument {arg!r}: {file} is damaged ({error}). {_FIX}") from error
    if not isinstance(settings, dict) or not {"model", "optim", "data"} <= settings.keys():
        raise ValueError(f"config argument {arg!r}: {file} is another program's. {_FIX}")
    return translated(settings)


def fill(cfg: ConfigDict, values: dict[str, Any]) -> None:
    """Sets what JSON holds in `cfg`, group by group."""
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(cfg.get(name), ConfigDict):
            fill(cfg[name], value)
        else:
            # JSON has no tuples, settings have no lists.
            cfg[name] = tuple(value) if isinstance(value, list) else value
