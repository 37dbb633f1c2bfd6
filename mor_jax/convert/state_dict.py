"""State dict by reference name <-> parameter tree, in memory: for small models."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays, nested
from mor_jax.config import ModelConfig
from mor_jax.convert.names import entries
from mor_jax.convert.views import as_params, as_tensors
from mor_jax.types import Params


def to_params(cfg: ModelConfig, state: Mapping[str, Any]) -> Params:
    """State dict (anything `numpy.asarray` accepts, by reference name) -> parameter tree, float32.

    A shared weight may appear under any or all of its names; copies must be identical.

    Raises:
        ValueError: see `views.as_params`.
    """
    return nested(as_params(cfg, entries(cfg), from_arrays(state, "state dict")))


def from_params(cfg: ModelConfig, params: Params, *, aliases: bool = True) -> dict[str, np.ndarray]:
    """Parameter tree -> state dict by reference name, float32 in torch layout.

    Works on any tree of the same structure, such as gradients. `aliases`: include the
    further names of shared weights, as the reference does (the same array object under each name).

    Raises:
        ValueError: see `views.as_tensors`.
    """
    table = entries(cfg)
    tensors = as_tensors(cfg, table, from_arrays(dict(flatten(params)), "parameters"))
    unique = {name: tensors.read(name) for name in tensors.specs}
    listed = [entry for entry in table if aliases or not entry.is_alias]
    return {entry.name: unique[entry.canonical] for entry in listed}
