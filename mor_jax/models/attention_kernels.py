"""Dot-product attention: one function, several implementations of the same numbers.

Owns the choice between them and the dense reference. Everything here works on the arrays of one
device; a caller that shards batch or heads over a mesh wraps it in `shard_map`.
"""

import jax
import jax.numpy as jnp

from mor_jax.config import Attention, fail
from mor_jax.models.blockwise import blockwise_attention
from mor_jax.models.masks import Visibility, check_visibility, visible_keys
from mor_jax.types import Array, Float


def attend(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: Visibility,
    implementation: Attention = "auto",
) -> Float[Array, "b c h k"]:
    """Attention of c queries over n keys, key/value head g serving query heads g*(h/g) onwards.

    Scores are scaled by k**-0.5 and normalised in float32; the result has the dtype of `q`.

    Raises:
        ValueError: `visible` does not fit, or `implementation` cannot serve these arrays here.
    """
    check_visibility(visible, q.shape[1], k.shape[1])
    chosen = "blockwise" if implementation == "auto" else implementation
    if chosen == "xla":
        return dense_attention(q, k, v, visible)
    if chosen == "blockwise":
        return blockwise_attention(q, k, v, visible)
    fail("model.attention", implementation, "is not there yet", "Try 'blockwise'")


def dense_attention(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: Visibility,
) -> Float[Array, "b c h k"]:
    """The reference: every score at once, softmax written out. See `attend`."""
    b, c, h, width = q.shape
    n, g = k.shape[1:3]
    grouped = q.reshape(b, c, g, h // g, width)
    scores = jnp.einsum("bcgmk,bngk->bgmcn", grouped, k, preferred_element_type=jnp.float32)
    mask = visible_keys(visible, slice(0, c), slice(0, n))[:, None, None]
    scores = jnp.where(mask, scores * width**-0.5, jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    # A query without any visible key has no weight to share out: zeros, not 0/0.
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("bgmcn,bngk->bcgmk", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, c, h, width).astype(q.dtype)
