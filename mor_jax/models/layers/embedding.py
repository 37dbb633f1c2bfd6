"""The embedding table: look-up of tokens, and the logits of an output head."""

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.models.layers.initializers import normal, param
from mor_jax.types import Array, Float, Int


@jax.custom_vjp
def look_up(table: Float[Array, "v d"], tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """Rows of a table. The gradient of each row is summed over its tokens in float32."""
    return jnp.take(table, tokens, axis=0)


def _look_up_fwd(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    # Of the table only shape and dtype are read, so the compiler saves nothing of it.
    return look_up(table, tokens), (table, tokens)


def _look_up_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table, tokens = saved
    rows = jnp.zeros(table.shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32))
    return rows.astype(table.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Embed(nnx.Module):
    """A (vocab_size, hidden_size) table: token embedding, or the output projection."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        axes = (("vocab", cfg.vocab_size), ("embed", cfg.hidden_size))
        self.weight = param(rngs, normal(cfg), axes)

    def __call__(self, tokens: Int[Array, "b l"], dtype: jnp.dtype) -> Float[Array, "b l d"]:
        """Embeddings of `tokens`."""
        return look_up(self.weight[...], tokens).astype(dtype)


def unembed(hidden: Float[Array, "... d"], table: Float[Array, "v d"]) -> Float[Array, "... v"]:
    """Float32 logits of normalised hidden states, from the (vocab_size, hidden_size) table."""
    return jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
