"""The gated MLP of a Llama layer (SwiGLU; Shazeer 2020, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.models.layers.initializers import Axes, normal, param
from mor_jax.models.layers.remat import save_wide_output
from mor_jax.types import Array, Float


@jax.custom_vjp
def gated_mlp(
    x: Float[Array, "b l d"],
    gate: Float[Array, "d f"],
    up: Float[Array, "d f"],
    down: Float[Array, "f d"],
) -> Float[Array, "b l d"]:
    """down(silu(x gate) * (x up)); saves only x and the two wide products for the backward pass."""
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
    # Weight gradients contract over tokens with the wide array as second operand. Automatic
    # differentiation would swap the operands, and XLA on CPUs would then transpose the wide arrays.
    d_down = jnp.einsum("bld,blf->df", d_y, (act * u).astype(x.dtype)).T
    d_x = jnp.einsum("blf,df->bld", d_g, gate) + jnp.einsum("blf,df->bld", d_u, up)
    return d_x, jnp.einsum("bld,blf->df", x, d_g), jnp.einsum("bld,blf->df", x, d_u), d_down


gated_mlp.defvjp(_mlp_fwd, _mlp_bwd)


class SwiGLU(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        d, f, init = ("embed", cfg.hidden_size), ("mlp", cfg.intermediate_size), normal(cfg)
        self.gate = param(rngs, init, (d, f), stacked)
        self.up = param(rngs, init, (d, f), stacked)
        self.down = param(rngs, init, (f, d), stacked)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Maps each token independently."""
        weights = (matrix[...].astype(x.dtype) for matrix in (self.gate, self.up, self.down))
        return gated_mlp(x, *weights)
