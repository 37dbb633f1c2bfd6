"""Attention on NVIDIA GPUs through cuDNN's flash kernels, for shapes that cuDNN does not take too.

cuDNN wants 16 bits, heads of a multiple of 8 up to 128, and for training even lengths. Heads and
lengths are padded with zeros, which changes nothing: a zero channel adds nothing to a score, a
padded key is hidden by causal order or by the mask, and padded queries are cut off.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.models.layers.masks import AttentionMask, dense_mask, sees_any
from mor_jax.types import Array, Bool, Float

LENGTHS, HEADS = 2, 8
"""Lengths and sizes of heads come in multiples of these. Not of more: whatever is padded is copied,
and the kernels cut their tiles at any length."""

LARGEST_HEAD = 128
"""Hopper takes 256, older GPUs do not, and a program may be compiled for either."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What cuDNN is called with, for any number of rows and heads."""

    queries: int
    keys: int
    head_dim: int


def cudnn_sizes(q: Float[Array, "b c h k"], k: Float[Array, "b n g k"]) -> Sizes:
    """The nearest sizes, none smaller, that cuDNN takes."""
    lengths = (-(-x.shape[1] // LENGTHS) * LENGTHS for x in (q, k))
    return Sizes(*lengths, -(-q.shape[-1] // HEADS) * HEADS)


def cudnn_obstacle(q: Float[Array, "b c h k"]) -> tuple[str, str] | None:
    """Why cuDNN cannot serve these queries, padded or not, and what would help; else `None`.

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
    how = {"is_causal": True} if visible.is_plain else {"mask": _mask(visible, sizes, q, k)}
    out = jax.nn.dot_product_attention(query, *keys, scale=scale, implementation="cudnn", **how)
    out = out[:, :c, :, :width]
    alive = sees_any(visible)
    # Where cuDNN hides all keys of a query, it shares the query's weight out among them.
    return out if alive is None else jnp.where(alive[:, :, None, None], out, 0)


def _mask(visible: AttentionMask, sizes: Sizes, q: Array, k: Array) -> Bool[Array, "_ 1 c n"]:
    """The mask of one head, False at padding.

    cuDNN adds it as numbers of 16 bits and makes as many for their gradient: 5 bytes a query and
    key of a micro-batch's rows, for one layer at a time. Its packed layout, which needs none for
    documents, is not in JAX's public function.
    """
    (c, n), (queries, keys) = (q.shape[1], k.shape[1]), (sizes.queries, sizes.keys)
    mask = dense_mask(visible, c, n)
    return jnp.pad(mask, [(0, 0), (0, queries - c), (0, keys - n)])[:, None]


def _pad(x: Float[Array, "b n h k"], length: int, width: int) -> Float[Array, "b _ h _"]:
    """Zeros at the end of positions and channels; `x` itself where there is nothing to add."""
    more = (length - x.shape[1], width - x.shape[3])
    return x if more == (0, 0) else jnp.pad(x, [(0, 0), (0, more[0]), (0, 0), (0, more[1])])
