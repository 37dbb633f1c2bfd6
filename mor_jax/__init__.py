"""mor_jax: pretraining, study and serving of Mixture-of-Recursions language models in JAX.

The Python interface is `train`, `load`, `evaluate` and `export`; docs/python.md shows it. Importing
this package imports none of its dependencies: they come with the first use of one of the four.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor_jax.api.evaluate import evaluate
    from mor_jax.api.export import export
    from mor_jax.api.model import Model, load
    from mor_jax.api.train import train

__version__ = "0.2.0.dev0"

_HOMES = {
    "Model": "model",
    "evaluate": "evaluate",
    "export": "export",
    "load": "model",
    "train": "train",
}

__all__ = ["Model", "__version__", "evaluate", "export", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mor_jax' has no attribute {name!r}; it has {__all__}")
    value = getattr(importlib.import_module(f"mor_jax.api.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
