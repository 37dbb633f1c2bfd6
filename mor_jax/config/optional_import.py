"""Optional packages: imported at first use, with an error that names what to install."""

import importlib
from typing import Any

from mor_jax.config.parsing import fail

_INSTALL_ARGUMENTS = {"lm_eval": "-c requirements.lock -r requirements-eval.txt"}
"""Arguments of `pip install` for modules with their own requirements file, at tested versions."""


def require_package(module: str, setting: str, value: str) -> Any:
    """Imports a module that `setting=value` needs.

    Raises `ValueError` with the `pip install` command if it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        rule = f"needs a package that is missing ({error})"
        arguments = _INSTALL_ARGUMENTS.get(module, package)
        fail(setting, value, rule, f"Run pip install {arguments}")
