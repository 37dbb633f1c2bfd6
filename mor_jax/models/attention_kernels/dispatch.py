"""Dot-product attention: one function with several implementations of the same mathematics.

Chooses between them and holds the dense reference. All of them run under a mesh: sequences and
heads may be sharded over devices, positions are not.
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

    implementation: `xla` is the dense reference; `blockwise` is plain JAX in blocks, for CPUs and
        unsupported shapes; `cudnn` is for NVIDIA GPUs in 16 bits; `splash` is for TPUs, also when
        compiled ahead of time elsewhere; `auto` is the best of them for the mesh's devices.

    Raises:
        ValueError: `visible` does not fit, or `implementation` does not support these arrays or
            this platform.
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
        # Imported late: Pallas slows start-up and is useless without TPUs.
        from mor_jax.models.attention_kernels.splash import splash_attention

        return splash_attention(q, k, v, visible)
    if chosen == "blockwise":
        return blockwise_attention(q, k, v, visible)
    return dense_attention(q, k, v, visible)


def best_implementation(q: Float[Array, "b c h k"], platform: str) -> Attention:
    """The implementation that `auto` stands for on `platform` (see `mesh.platform`)."""
    if platform == "tpu":
        return "splash"
    if platform == "cuda" and cudnn_obstacle(q) is None:
        return "cudnn"
    return "blockwise"


def check_kernel(implementation: Attention, platform: str) -> None:
    """Raises `ValueError` if `implementation` does not run on `platform` (see `mesh.platform`)."""
    needed, where = _NEEDED.get(implementation, (platform, ""))
    rule = f"runs on {where} only, this computation is for {platform!r}"
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
    # A query without a visible key has no weights: zeros instead of 0/0.
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("bgmcn,bngk->bcgmk", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, c, h, width).astype(q.dtype)
