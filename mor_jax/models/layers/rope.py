"""Rotary position embedding, rotate-half convention (Su et al. 2021, as Llama lays it out)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mor_jax.config import RopeScaling
from mor_jax.types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines, float32, one row per token; the batch axis is 1 or b."""

    cos: Float[Array, "_ l half"]
    sin: Float[Array, "_ l half"]


UNSCALED = RopeScaling()


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling = UNSCALED
) -> Float[Array, "half"]:
    """Angle per position of every channel pair, float32: theta^(-2i / head_dim), scaled."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    unscaled = theta**-exponent
    if scaling.rope_type == "none":
        return unscaled
    if scaling.rope_type == "linear":
        return unscaled / scaling.factor
    # Llama 3: periods in the original context decide how much of each frequency stays unscaled.
    periods = unscaled * (scaling.original_max_position_embeddings / (2 * math.pi))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    weight = jnp.clip((periods - low) / (high - low), 0.0, 1.0)
    return (1.0 - weight) * (unscaled / scaling.factor) + weight * unscaled


def compute_rotary_tables(
    positions: Int[Array, "b l"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling = UNSCALED,
) -> RotaryTables:
    """Tables of `positions`: angle_i = position * frequency_i, i < head_dim / 2."""
    frequency = frequencies(head_dim, theta, scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
    return RotaryTables(jnp.cos(angle), jnp.sin(angle))


def apply_rope(x: Float[Array, "b l h k"], tables: RotaryTables) -> Float[Array, "b l h k"]:
    """Rotates channel pairs (i, i + k/2) of every head; computed in float32, result in x.dtype."""
    # The two halves get an axis of their own: a reshape is free, a concatenation costs a pass.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    sin = jnp.stack([-tables.sin, tables.sin], axis=-2)[:, :, None]
    cos = tables.cos[:, :, None, None]
    return (halves * cos + jnp.flip(halves, -2) * sin).reshape(x.shape).astype(x.dtype)
