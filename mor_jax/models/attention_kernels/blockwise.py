"""Attention in blocks of queries, in plain XLA: runs everywhere, and is the choice for CPUs.

Each block of queries attends only to the keys that some of its queries can see: a static prefix.
The backward pass recomputes the probabilities from the saved log-sum-exp (Dao et al.,
FlashAttention, arXiv 2205.14135, section 3.1), so nothing of size queries x keys
outlives a block.

In this file queries are laid out as rows: `w` runs over queries and, fastest, over the h/g heads
that share a key head, so every product is one matrix product per (batch, key head). The backward
pass works on transposed scores "b g n w": then no product contracts the slow axis of both
operands, which would take a CPU's matrix kernels up to four times as long.
"""

import functools

import jax
import jax.numpy as jnp

from mor_jax.models.layers.masks import AttentionMask, visible_keys
from mor_jax.models.layers.remat import save_output
from mor_jax.types import Array, Bool, Float

HIDDEN = -1e30
"""Score of a hidden key: finite, so that a row without a visible key yields no NaN."""

FLOOR = -1e29
"""Least log-sum-exp of a row: with every key hidden, exp(HIDDEN - FLOOR) is 0 instead of 1."""

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def blockwise_attention(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: AttentionMask,
) -> Float[Array, "b c h k"]:
    """Exact attention; see `attend` for the arguments."""
    return _forward(q, k, v, visible)[0]


def _forward(q: Array, k: Array, v: Array, visible: AttentionMask) -> tuple[Array, tuple]:
    q_rows, k, v = _to_rows(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    heads = q.shape[2] // k.shape[1]
    outs, sums = [], []
    for queries, keys in _blocks(q.shape[1], k.shape[2]):
        rows = slice(queries.start * heads, queries.stop * heads)
        scores = _dot("bgwk,bgnk->bgwn", q_rows[:, :, rows], k[:, :, keys]) * q.shape[-1] ** -0.5
        scores = jnp.where(_mask(visible, queries, keys, heads), scores, HIDDEN)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        out = _dot("bgwn,bgnk->bgwk", weights.astype(v.dtype), v[:, :, keys])
        outs.append((out / total).astype(q.dtype))
        sums.append((top + jnp.log(total))[..., 0])
    out = save_output(_from_rows(jnp.concatenate(outs, axis=2), q.shape[2]))
    sums = save_output(jnp.concatenate(sums, axis=2))
    return out, (save_output(q_rows), save_output(k), save_output(v), visible, out, sums)


def _backward(saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible, out, log_sums = saved
    g, heads = k.shape[1], out.shape[2] // k.shape[1]
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    inner, d_out = _to_rows(inner, g)[..., 0], _to_rows(d_out, g)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys in _blocks(out.shape[1], k.shape[2]):
        rows = slice(queries.start * heads, queries.stop * heads)
        q_block, d_block = q[:, :, rows], d_out[:, :, rows]
        k_block, v_block = k[:, :, keys], v[:, :, keys]
        scores = _dot("bgnk,bgwk->bgnw", k_block, q_block) * q.shape[-1] ** -0.5
        hidden = ~_mask(visible, queries, keys, heads).swapaxes(2, 3)
        scores = jnp.where(hidden, HIDDEN, scores - log_sums[:, :, None, rows])
        weights = jnp.exp(scores)
        d_weights = _dot("bgnk,bgwk->bgnw", v_block, d_block)
        d_scores = (weights * (d_weights - inner[:, :, None, rows])).astype(q.dtype)
        d_v = d_v.at[:, :, keys].add(_dot("bgnw,bgwk->bgnk", weights.astype(v.dtype), d_block))
        d_k = d_k.at[:, :, keys].add(_dot("bgnw,bgwk->bgnk", d_scores, q_block))
        d_q.append(_dot("bgnk,bgnw->bgkw", k_block, d_scores))
    scale = q.shape[-1] ** -0.5
    d_q = jnp.concatenate(d_q, axis=3).swapaxes(2, 3) * scale
    d_q = _from_rows(d_q.astype(q.dtype), out.shape[2])
    d_k, d_v = (d_k * scale).astype(k.dtype), d_v.astype(v.dtype)
    return d_q, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3), None


blockwise_attention.defvjp(_forward, _backward)


def _blocks(queries: int, keys: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that it can see (see `AttentionMask.q_index`).

    Small blocks waste less work above the diagonal, few blocks compile fast: all queries at once
    up to 256, else blocks of 64, or larger where that would make over 8 of them.
    """
    size = queries if queries <= 256 else 64 * max(1, -(-queries // 512))
    stops = [min(start + size, queries) for start in range(0, queries, size)]
    return [
        (slice(size * i, stop), slice(0, keys - queries + stop)) for i, stop in enumerate(stops)
    ]


def _mask(
    visible: AttentionMask, queries: slice, keys: slice, heads: int
) -> Bool[Array, "_ 1 w n"]:
    """Visible keys of each row of a block, with `heads` rows per query."""
    return jnp.repeat(visible_keys(visible, queries, keys), heads, axis=1)[:, None]


def _to_rows(x: Float[Array, "b c h k"], g: int) -> Float[Array, "b g w k"]:
    b, c, h, width = x.shape
    x = x.reshape(b, c, g, h // g, width).transpose(0, 2, 1, 3, 4)
    return x.reshape(b, g, c * h // g, width)


def _from_rows(x: Float[Array, "b g w k"], h: int) -> Float[Array, "b c h k"]:
    b, g, w, width = x.shape
    x = x.reshape(b, g, w * g // h, h // g, width).transpose(0, 2, 1, 3, 4)
    return x.reshape(b, w * g // h, h, width)
