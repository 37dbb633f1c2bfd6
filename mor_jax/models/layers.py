"""RMSNorm, SwiGLU and embedding: the parts of a Llama layer that hold no attention.

Modules hold float32 parameters; the free functions are the mathematics. Every parameter carries
`axes`, its logical axis names, for the sharding rules.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.types import Array, Float, Int

Axes = tuple[tuple[str, int], ...]
"""Named axes of a parameter: (name, size) pairs."""


@dataclasses.dataclass(frozen=True)
class Init:
    """How a parameter starts: N(mean, std^2), a constant where `std` is 0."""

    mean: float = 0.0
    std: float = 0.0


def param(rngs: nnx.Rngs, init: Init, axes: Axes, stacked: Axes = ()) -> nnx.Param:
    """A float32 parameter with named axes, after the leading axes of its stack.

    `axes` and `init` stay on it as metadata, for the sharding rules and for `state.init_params`.
    """
    named = stacked + axes
    shape = tuple(size for _, size in named)
    value = init.mean + init.std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=tuple(name for name, _ in named), init=init)


def normal(cfg: ModelConfig) -> Init:
    """The start of every matrix: N(0, init_std^2)."""
    return Init(std=cfg.init_std)


ONES, ZEROS = Init(mean=1.0), Init()


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, "d"], eps: float) -> Array:
    """Root-mean-square normalisation in float32, cast back before the scale.

    The scale is multiplied in x's dtype, as Llama does.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = (wide * inverse).astype(x.dtype)
    return normed * jax.lax.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale, initialised to one."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        self.scale = param(rngs, ONES, (("embed", cfg.width),), stacked)
        self.eps = cfg.norm_eps

    def __call__(self, x: Float[Array, "... d"], which: int | None = None) -> Array:
        """Normalises the last axis. which: row of the scale, where it holds several."""
        scale = self.scale[...] if which is None else self.scale[...][which]
        return rms_norm(x, scale, self.eps)


class SwiGLU(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        d, f, init = ("embed", cfg.width), ("mlp", cfg.mlp_width), normal(cfg)
        self.gate = param(rngs, init, (d, f), stacked)
        self.up = param(rngs, init, (d, f), stacked)
        self.down = param(rngs, init, (f, d), stacked)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Maps each token on its own."""
        gate = jnp.einsum("bld,df->blf", x, self.gate[...].astype(x.dtype))
        up = jnp.einsum("bld,df->blf", x, self.up[...].astype(x.dtype))
        return jnp.einsum("blf,fd->bld", jax.nn.silu(gate) * up, self.down[...].astype(x.dtype))


class Embed(nnx.Module):
    """A (vocabulary, width) table: token embedding, or the output projection."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        axes = (("vocab", cfg.vocab_size), ("embed", cfg.width))
        self.weight = param(rngs, normal(cfg), axes)

    def __call__(self, tokens: Int[Array, "b l"], dtype: jnp.dtype) -> Float[Array, "b l d"]:
        """Looks tokens up."""
        return jnp.take(self.weight[...], tokens, axis=0).astype(dtype)


def unembed(hidden: Float[Array, "... d"], table: Float[Array, "v d"]) -> Float[Array, "... v"]:
    """Logits in float32 of normalised hidden states, from the (vocabulary, width) table."""
    return jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
