"""Creation of parameters: float32 arrays with named axes and an initial distribution.

Every parameter carries `axes`, its logical axis names, for the sharding rules.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig

Axes = tuple[tuple[str, int], ...]
"""Named axes of a parameter: (name, size) pairs."""


@dataclasses.dataclass(frozen=True)
class Init:
    """Initial distribution of a parameter: N(mean, std^2), or the constant `mean` if `std` is 0."""

    mean: float = 0.0
    std: float = 0.0


def param(rngs: nnx.Rngs, init: Init, axes: Axes, stacked: Axes = ()) -> nnx.Param:
    """A float32 parameter with named axes; the axes of its stack come first.

    `axes`, `sizes` and `init` are its metadata, for sharding and for `params.init_params`.
    """
    named = stacked + axes
    shape = tuple(size for _, size in named)
    value = init.mean + init.std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=tuple(name for name, _ in named), sizes=shape, init=init)


def normal(cfg: ModelConfig) -> Init:
    """Initial distribution of every matrix: N(0, init_std^2)."""
    return Init(std=cfg.init_std)


ONES, ZEROS = Init(mean=1.0), Init()
