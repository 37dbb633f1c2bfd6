"""The shipped configurations: where they lie, their names, and how one is read.

In a checkout they lie in `configs/` at the top; installed they are the package `mor_jax.configs`.
"""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]

CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "launch" / "train.py").is_file() else None
"""The repository that this package is a part of; None where it was installed."""

CONFIGS = PACKAGE / "configs" if CHECKOUT is None else CHECKOUT / "configs"
"""The directory of the shipped configurations."""

TRAIN = PACKAGE / "cli" / "train.py" if CHECKOUT is None else CHECKOUT / "launch" / "train.py"
"""A script that trains, for commands that start other processes."""


def shipped() -> list[str]:
    """Names of the shipped configurations, such as `mor`."""
    files = (path.stem for path in sorted(CONFIGS.glob("*.py")))
    return [name for name in files if name not in ("__init__", "common")]


def config_path(given: str) -> str:
    """`mor:size=360m` with the path of the shipped file; a path of a file stays as it is."""
    name, colon, choices = given.partition(":")
    if name in shipped() and not Path(name).is_file():
        return f"{CONFIGS / name}.py{colon}{choices}"
    return given


def nearest(name: str) -> str | None:
    """The shipped configuration whose name is like `name`, None if there is none."""
    return next(iter(difflib.get_close_matches(name, shipped(), n=1, cutoff=0.6)), None)


def read_config(given: str) -> dict[str, Any]:
    """Settings as nested plain values, of `mor:size=360m` or `path/to/config.py:CHOICES`.

    Raises:
        ValueError: there is no such configuration, or it refuses the choices.
    """
    name, _, choices = config_path(given).partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        near = nearest(name)
        fix = f"Did you mean {near!r}?" if near else f"Give a file or one of {shipped()}"
        raise ValueError(f"config={given!r}: neither a file nor a shipped configuration. {fix}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"config={given!r}: not a Python file. Give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        fix = "Define get_config(), which returns a ConfigDict"
        raise ValueError(f"config={given!r}: has no function get_config. {fix}")
    return (module.get_config(choices) if choices else module.get_config()).to_dict()
