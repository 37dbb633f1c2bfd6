"""Parameters without a compilation: what most tests want from a model's parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.models.params import abstract_params, paths
from mor_jax.types import Params


@functools.cache
def random_params(cfg: ModelConfig, seed: int = 0) -> Params:
    """Seeded parameters in which nothing is left at 0 or 1, so that no use of one is overlooked."""
    shapes, structure = jax.tree.flatten(abstract_params(cfg))
    rng = np.random.default_rng(seed)
    leaves = []
    for name, shape in zip(paths(abstract_params(cfg)), shapes, strict=True):
        draw = rng.normal(size=shape.shape)
        value = 1 + 0.2 * draw if name.endswith("scale") else 0.1 * draw
        leaves.append(jnp.asarray(value, jnp.float32))
    return structure.unflatten(leaves)
