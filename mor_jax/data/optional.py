"""Packages that only some sources and tokenizers need: imported at use, named when they lack."""

import importlib
from typing import Any

from mor_jax.config import fail


def need(module: str, setting: str, value: str) -> Any:
    """The module, imported now because `setting=value` asks for it.

    Raises `ValueError` that names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        rule = f"needs a package that is missing ({error})"
        fail(setting, value, rule, f"Run pip install {package}")
