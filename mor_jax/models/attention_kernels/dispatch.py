"""Dot-product attention: one function, several implementations of the same numbers.

Owns the choice between them and the dense reference. All of them run under a mesh: rows and heads
may be cut over devices, positions are whole.
"""

import jax
import jax.numpy as jnp

from mor_jax.config import Attention
from mor_jax.config.parsing import check
from mor_jax.distributed.mesh import platform
from mor_jax.models.attention_kernels.blockwise import blockwise_attention
from mor_jax.models.attention_kernels.cudnn import cudnn_attention, cudnn_obstacle
from mor_jax.models.layers.masks import AttentionMask, check_mask, dense_mask
from mor_jax.types import Array, Float

PATH = "model.attention"
_NEEDED = {"cudnn": ("cuda", "NVIDIA GPUs"), "splash": ("tpu", "TPUs")}


def attend(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: AttentionMask,
    implementation: Attention = "auto",
) -> Float[Array, "b c h k"]:
    """Attention of c queries over n keys; key/value head i serves query heads i*(h/g) onwards.

    Scores are scaled by k**-0.5 and normalised in float32; the result has the dtype of `q`. A
    query that sees no key gets zeros.

    implementation: `xla` the dense reference; `blockwise` plain JAX in blocks, for CPUs and
        anything unusual; `cudnn` for NVIDIA GPUs in 16 bits; `splash` for TPUs, also when compiled
        ahead of time elsewhere; `auto` the best of them for the mesh's devices.

    Raises:
        ValueError: `visible` does not fit, or `implementation` cannot serve these arrays here.
    """
    check_mask(visible, q.shape[1], k.shape[1])
    chosen = implementation
    if chosen == "auto":
        chosen = best_implementation(q, platform())
    check_kernel(implementation, platform())
    if implementation == "cudnn" and (obstacle := cudnn_obstacle(q)) is not None:
        check(False, PATH, "cudnn", *obstacle)
    if chosen == "cudnn":
        return cudnn_attention(q, k, v, visible)
    if chosen == "splash":
        # Imported late: Pallas slows the start of a program and is of no use off TPUs.
        from mor_jax.models.attention_kernels.splash import splash_attention

        return splash_attention(q, k, v, visible)
    if chosen == "blockwise":
        return blockwise_attention(q, k, v, visible)
    return dense_attention(q, k, v, visible)


def best_implementation(q: Float[Array, "b c h k"], platform: str) -> Attention:
    """What `auto` stands for on a platform (see `platform`)."""
    if platform == "tpu":
        return "splash"
    if platform == "cuda" and cudnn_obstacle(q) is None:
        return "cudnn"
    return "blockwise"


def check_kernel(implementation: Attention, platform: str) -> None:
    """Raises `ValueError` if an implementation is not of a platform (see `platform`)."""
    needed, where = _NEEDED.get(implementation, (platform, ""))
    rule = f"it runs on {where}, this computation is for {platform!r}"
    check(platform == needed, PATH, implementation, rule, "Use 'auto'")


def dense_attention(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: AttentionMask,
) -> Float[Array, "b c h k"]:
    """The reference: every score at once, softmax written out. See `attend`."""
    b, c, h, width = q.shape
    g = k.shape[2]
    grouped = q.reshape(b, c, g, h // g, width)
    scores = jnp.einsum("bcgmk,bngk->bgmcn", grouped, k, preferred_element_type=jnp.float32)
    mask = dense_mask(visible, c, k.shape[1])[:, None, None]
    scores = jnp.where(mask, scores * width**-0.5, jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    # A query without any visible key has no weight to share out: zeros, not 0/0.
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("bgmcn,bngk->bcgmk", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, c, h, width).astype(q.dtype)
