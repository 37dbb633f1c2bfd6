"""Packages that only some sources and tokenizers need: imported at use, named when they lack."""

import importlib
from typing import Any

from mor_jax.config.parsing import fail

_OF_FILES = {"lm_eval": "-c requirements.lock -r requirements-eval.txt"}
"""What the project's own files install, at the versions that were tested."""


def need(module: str, setting: str, value: str) -> Any:
    """The module, imported now because `setting=value` asks for it.

    Raises `ValueError` that names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        rule = f"needs a package that is missing ({error})"
        wanted = _OF_FILES.get(module, package)
        fail(setting, value, rule, f"Run pip install {wanted}")
