"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.models.layers.initializers import ONES, Axes, param
from mor_jax.types import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... d"], scale: Float[Array, "d"], eps: float) -> Array:
    """Root-mean-square normalisation in float32, cast back before the scale.

    The scale is multiplied in x's dtype, as Llama does. Only `x` and `scale` are
    saved for the backward pass; the rest is recomputed in one pass over `x`.
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


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale, initialised to one."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        self.scale = param(rngs, ONES, (("embed", cfg.hidden_size),), stacked)
        self.eps = cfg.norm_eps

    def __call__(self, x: Float[Array, "... d"], which: int | None = None) -> Array:
        """Normalises the last axis. which: recursion, where each has its own scale."""
        scale = self.scale[...] if which is None else self.scale[...][which]
        return rms_norm(x, scale, self.eps)
