"""The checker that the import hook of conftest.py applies to every function of mor_jax."""

from typing import Any

import beartype


def check(fn: Any) -> Any:
    """Checks the arguments and results of functions, but not what structs are built from.

    JAX rebuilds registered dataclasses around placeholders, shardings and NumPy arrays, so a
    check in their constructor would forbid `jax.tree.map` over them. Functions that take or
    return such a struct's arrays are still checked.
    """
    return fn if getattr(fn, "__name__", "") == "__init__" else beartype.beartype(fn)
