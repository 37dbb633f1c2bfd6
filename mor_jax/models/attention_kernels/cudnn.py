"""Attention on NVIDIA GPUs through cuDNN's flash kernels, padded to shapes that cuDNN supports.

cuDNN needs 16-bit arrays, head sizes that are multiples of 8 up to 128, and even lengths for
training. Heads and lengths are padded with zeros, which changes no result: a zero channel adds
nothing to a score, a padded key is hidden by causal order or by the mask, and padded queries are
cut off.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.models.layers.masks import AttentionMask, dense_mask, sees_any
from mor_jax.types import Array, Bool, Float

LENGTHS, HEADS = 2, 8
"""Lengths and head sizes are padded to multiples of these. Larger multiples would gain nothing:
padding copies an array, and the kernels handle partial tiles."""

LARGEST_HEAD = 128
"""Hopper supports 256, older GPUs do not, and a function may be compiled for either."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that cuDNN is called with; any batch size and number of heads will do."""

    queries: int
    keys: int
    head_dim: int


def cudnn_sizes(q: Float[Array, "b c h k"], k: Float[Array, "b n g k"]) -> Sizes:
    """The smallest sizes that cuDNN supports and that hold these arrays."""
    lengths = (-(-x.shape[1] // LENGTHS) * LENGTHS for x in (q, k))
    return Sizes(*lengths, -(-q.shape[-1] // HEADS) * HEADS)


def cudnn_obstacle(q: Float[Array, "b c h k"]) -> tuple[str, str] | None:
    """Why cuDNN cannot process these queries, even padded, and a fix; else `None`.

    The limits are those of `jax.nn.dot_product_attention(implementation="cudnn")`.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs 16-bit arrays, got {q.dtype}", "Set model.dtype='bfloat16'"
    if q.shape[-1] > LARGEST_HEAD:
        return f"needs head_dim to be at most {LARGEST_HEAD}, got {q.shape[-1]}", "Use 'blockwise'"
    return None


def cudnn_attention(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: AttentionMask,
) -> Float[Array, "b c h k"]:
    """See `attend` for the arguments."""
    sizes = cudnn_sizes(q, k)
    (_, c, _, width), scale = q.shape, q.shape[-1] ** -0.5
    query = _pad(q, sizes.queries, sizes.head_dim)
    keys = [_pad(x, sizes.keys, sizes.head_dim) for x in (k, v)]
    mask = {"is_causal": True} if visible.is_plain else {"mask": _mask(visible, sizes, q, k)}
    out = jax.nn.dot_product_attention(query, *keys, scale=scale, implementation="cudnn", **mask)
    out = out[:, :c, :, :width]
    sees = sees_any(visible)
    # If all keys of a query are hidden, cuDNN spreads the query's weight over them.
    return out if sees is None else jnp.where(sees[:, :, None, None], out, 0)


def _mask(visible: AttentionMask, sizes: Sizes, q: Array, k: Array) -> Bool[Array, "_ 1 c n"]:
    """The mask of one head, False at padding.

    cuDNN adds it as 16-bit numbers and computes as many for their gradient: 5 bytes per query and
    key of a micro-batch, for one layer at a time. JAX's public function does not offer cuDNN's
    packed layout, which needs no mask for documents.
    """
    (c, n), (queries, keys) = (q.shape[1], k.shape[1]), (sizes.queries, sizes.keys)
    mask = dense_mask(visible, c, n)
    return jnp.pad(mask, [(0, 0), (0, queries - c), (0, keys - n)])[:, None]


def _pad(x: Float[Array, "b n h k"], length: int, width: int) -> Float[Array, "b _ h _"]:
    """Zeros at the end of positions and channels; `x` itself if there is nothing to pad."""
    more = (length - x.shape[1], width - x.shape[3])
    return x if more == (0, 0) else jnp.pad(x, [(0, 0), (0, more[0]), (0, 0), (0, more[1])])
