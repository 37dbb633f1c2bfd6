"""Attention in blocks of queries, in plain XLA: runs everywhere, and is the one for CPUs.

Each block of queries meets only the keys that some of its queries can see: a static prefix. The
backward pass recomputes the probabilities from the saved log-sum-exp (Dao et al., FlashAttention,
arXiv 2205.14135, section 3.1), so that nothing of size queries x keys outlives a block.
"""

import functools

import jax
import jax.numpy as jnp

from mor_jax.models.masks import Visibility, visible_keys
from mor_jax.types import Array, Float

HIDDEN = -1e30
"""Score of a hidden key: finite, so that a row without any visible key stays free of NaN."""

BLOCK = 128
"""Queries per block."""


def blockwise_attention(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: Visibility,
) -> Float[Array, "b c h k"]:
    """Exact attention; see `attend` for the arguments."""
    b, c, h, width = q.shape
    g = k.shape[2]
    grouped = q.reshape(b, c, g, h // g, width).transpose(0, 2, 3, 1, 4)
    out = _attend(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), visible)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, c, h, width)


def _blocks(c: int, n: int) -> list[tuple[slice, slice]]:
    """Query blocks, each with the keys that it may see (q_index[i] <= n - c + i)."""
    starts = range(0, c, BLOCK)
    stops = [min(start + BLOCK, c) for start in starts]
    return [
        (slice(start, stop), slice(0, n - c + stop))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _scores(q: Array, k: Array, visible: Visibility, rows: slice, columns: slice) -> Array:
    """Masked scores in float32 of one block: [b g m rows columns]."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum(
        "bgmck,bgnk->bgmcn",
        q[:, :, :, rows] * jnp.asarray(scale, q.dtype),
        k[:, :, columns],
        preferred_element_type=jnp.float32,
    )
    mask = visible_keys(visible, rows, columns)
    return scores if mask is None else jnp.where(mask[:, None, None], scores, HIDDEN)


@functools.partial(jax.custom_vjp)
def _attend(q: Array, k: Array, v: Array, visible: Visibility) -> Array:
    return _forward(q, k, v, visible)[0]


def _forward(q: Array, k: Array, v: Array, visible: Visibility) -> tuple[Array, tuple]:
    outs, sums = [], []
    for rows, columns in _blocks(q.shape[3], k.shape[2]):
        scores = _scores(q, k, visible, rows, columns)
        top = jnp.max(scores, axis=-1, keepdims=True)
        # A row that sees nothing has only HIDDEN scores: its weights must be 0, not exp(0).
        weights = jnp.exp(scores - jnp.maximum(top, HIDDEN / 2))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        out = jnp.einsum(
            "bgmcn,bgnk->bgmck",
            weights.astype(v.dtype),
            v[:, :, columns],
            preferred_element_type=jnp.float32,
        )
        outs.append((out / total).astype(q.dtype))
        sums.append(jnp.maximum(top, HIDDEN / 2) + jnp.log(total))
    out = jnp.concatenate(outs, axis=3)
    return out, (q, k, v, visible, out, jnp.concatenate(sums, axis=3))


def _backward(saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible, out, log_sums = saved
    scale = q.shape[-1] ** -0.5
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for rows, columns in _blocks(q.shape[3], k.shape[2]):
        scores = _scores(q, k, visible, rows, columns)
        weights = jnp.exp(scores - log_sums[:, :, :, rows])
        d_block = d_out[:, :, :, rows]
        d_weights = dot("bgmck,bgnk->bgmcn", d_block, v[:, :, columns])
        d_scores = (weights * (d_weights - inner[:, :, :, rows])).astype(q.dtype)
        d_q.append((dot("bgmcn,bgnk->bgmck", d_scores, k[:, :, columns]) * scale).astype(q.dtype))
        d_k = d_k.at[:, :, columns].add(dot("bgmcn,bgmck->bgnk", d_scores, q[:, :, :, rows]))
        d_v = d_v.at[:, :, columns].add(dot("bgmcn,bgmck->bgnk", weights.astype(v.dtype), d_block))
    d_k = (d_k * scale).astype(k.dtype)
    return jnp.concatenate(d_q, axis=3), d_k, d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
