"""Rotary position embedding, rotate-half convention (Su et al. 2021, as Llama lays it out)."""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Cosines and sines, float32, one row per token; the batch axis is 1 or b."""

    cos: Float[Array, "_ l half"]
    sin: Float[Array, "_ l half"]


def rotary(positions: Int[Array, "b l"], head_dim: int, theta: float) -> Rotary:
    """Tables for `positions`: angle_i = position * theta^(-2i / head_dim), i < head_dim / 2."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) * (theta**-exponent)[None, None, :]
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def apply_rope(x: Float[Array, "b l h k"], tables: Rotary) -> Float[Array, "b l h k"]:
    """Turns channel pairs (i, i + k/2) of every head; computed in float32, returned as x.dtype."""
    # Both halves stand in an axis of their own: joining them again costs a pass, reshaping none.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    turned = jnp.stack([-tables.sin, tables.sin], axis=-2)[:, :, None]
    kept = tables.cos[:, :, None, None]
    return (halves * kept + jnp.flip(halves, -2) * turned).reshape(x.shape).astype(x.dtype)
