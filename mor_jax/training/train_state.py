"""The training state: everything that a step changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.types import Array, Int, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    step: int32 [], optimiser steps taken, skipped ones included. params: nested dictionary of
    float32 arrays. opt_state: of optax. skipped: int32 [], steps whose loss or gradient was not
    finite; skipped_in_a_row: int32 [], those since the last step that was not skipped.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def new_state(params: Params, opt_state: Any) -> TrainState:
    """The state before the first step."""
    # Three arrays, not one thrice: a state is donated, and a buffer can be donated only once.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, opt_state, skipped, in_a_row)


def fields(state: TrainState) -> dict[str, Any]:
    """The state as the nested dictionary that checkpoints hold."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
