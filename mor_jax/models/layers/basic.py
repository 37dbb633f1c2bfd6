"""RMSNorm, SwiGLU and embedding: the parts of a Llama layer that hold no attention.

Modules hold float32 parameters; the free functions are the mathematics. Every parameter carries
`axes`, its logical axis names, for the sharding rules.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.models.layers.remat import save_wide_output
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

    `axes`, `sizes` and `init` stay on it as metadata, for sharding and for `state.init_params`.
    """
    named = stacked + axes
    shape = tuple(size for _, size in named)
    value = init.mean + init.std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=tuple(name for name, _ in named), sizes=shape, init=init)


def normal(cfg: ModelConfig) -> Init:
    """The start of every matrix: N(0, init_std^2)."""
    return Init(std=cfg.init_std)


ONES, ZEROS = Init(mean=1.0), Init()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... d"], scale: Float[Array, "d"], eps: float) -> Array:
    """Root-mean-square normalisation in float32, cast back before the scale.

    The scale is multiplied in x's dtype, as Llama does. For the backward pass only `x` and
    `scale` are kept; the rest is recomputed in one pass over `x`.
    """
    return _rms_parts(x, eps)[1].astype(x.dtype) * _along(scale.astype(x.dtype), x)


def _rms_parts(x: Array, eps: float) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return inverse, wide * inverse


def _along(scale: Float[Array, "d"], x: Array) -> Array:
    return jax.lax.expand_dims(scale, range(x.ndim - 1))


def _rms_fwd(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return rms_norm(x, scale, eps), (x, scale)


def _rms_bwd(eps: float, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, scale = saved
    inverse, normed = _rms_parts(x, eps)
    wide = grad.astype(jnp.float32)
    pulled = wide * _along(scale, x)
    along = jnp.mean(pulled * normed, axis=-1, keepdims=True)
    d_scale = jnp.sum(wide * normed.astype(x.dtype), axis=range(x.ndim - 1))
    return ((pulled - normed * along) * inverse).astype(x.dtype), d_scale


rms_norm.defvjp(_rms_fwd, _rms_bwd)


@jax.custom_vjp
def gated_mlp(
    x: Float[Array, "b l d"],
    gate: Float[Array, "d f"],
    up: Float[Array, "d f"],
    down: Float[Array, "f d"],
) -> Float[Array, "b l d"]:
    """down(silu(x gate) * (x up)), keeping only x and the two wide products for the gradient."""
    return _mlp_fwd(x, gate, up, down)[0]


def _mlp_fwd(x: Array, gate: Array, up: Array, down: Array) -> tuple[Array, tuple[Array, ...]]:
    g = save_wide_output(jnp.einsum("bld,df->blf", x, gate))
    u = save_wide_output(jnp.einsum("bld,df->blf", x, up))
    y = jnp.einsum("blf,fd->bld", jax.nn.silu(g) * u, down)
    return y, (x, g, u, gate, up, down)


def _mlp_bwd(saved: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array, Array]:
    x, g, u, gate, up, down = saved
    half = jax.nn.sigmoid(g.astype(jnp.float32))
    act = g * half
    d_h = jnp.einsum("bld,fd->blf", d_y, down)
    d_g = (d_h * u * (half + act * (1 - half))).astype(x.dtype)
    d_u = (d_h * act).astype(x.dtype)
    # Weight gradients contract tokens with the wide array second: the forms that differentiating
    # the products would give make a CPU transpose the wide arrays first.
    d_down = jnp.einsum("bld,blf->df", d_y, (act * u).astype(x.dtype)).T
    d_x = jnp.einsum("blf,df->bld", d_g, gate) + jnp.einsum("blf,df->bld", d_u, up)
    return d_x, jnp.einsum("bld,blf->df", x, d_g), jnp.einsum("bld,blf->df", x, d_u), d_down


gated_mlp.defvjp(_mlp_fwd, _mlp_bwd)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale, initialised to one."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        self.scale = param(rngs, ONES, (("embed", cfg.hidden_size),), stacked)
        self.eps = cfg.norm_eps

    def __call__(self, x: Float[Array, "... d"], which: int | None = None) -> Array:
        """Normalises the last axis. which: row of the scale, where it holds several."""
        scale = self.scale[...] if which is None else self.scale[...][which]
        return rms_norm(x, scale, self.eps)


class SwiGLU(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        d, f, init = ("embed", cfg.hidden_size), ("mlp", cfg.intermediate_size), normal(cfg)
        self.gate = param(rngs, init, (d, f), stacked)
        self.up = param(rngs, init, (d, f), stacked)
        self.down = param(rngs, init, (f, d), stacked)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Maps each token on its own."""
        weights = (matrix[...].astype(x.dtype) for matrix in (self.gate, self.up, self.down))
        return gated_mlp(x, *weights)


@jax.custom_vjp
def look_up(table: Float[Array, "v d"], tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """Rows of a table. The gradient of a row is summed over its tokens in float32."""
    return jnp.take(table, tokens, axis=0)


def _look_up_fwd(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    # Of the table only shape and dtype are read, so the compiler keeps nothing of it.
    return look_up(table, tokens), (table, tokens)


def _look_up_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table, tokens = saved
    rows = jnp.zeros(table.shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32))
    return rows.astype(table.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Embed(nnx.Module):
    """A (vocabulary, width) table: token embedding, or the output projection."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        axes = (("vocab", cfg.vocab_size), ("embed", cfg.hidden_size))
        self.weight = param(rngs, normal(cfg), axes)

    def __call__(self, tokens: Int[Array, "b l"], dtype: jnp.dtype) -> Float[Array, "b l d"]:
        """Looks tokens up."""
        return look_up(self.weight[...], tokens).astype(dtype)


def unembed(hidden: Float[Array, "... d"], table: Float[Array, "v d"]) -> Float[Array, "... v"]:
    """Logits in float32 of normalised hidden states, from the (vocabulary, width) table."""
    return jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
