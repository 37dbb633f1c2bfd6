"""Grouped-query attention: projections, rotary embedding, and one call of the kernel.

Keys and values either come from the tokens themselves or are handed in (KV sharing, paper section
2.2.2). Which keys a query sees is described by its `Scope`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import Attention as Implementation
from mor_jax.config import ModelConfig
from mor_jax.models.attention_kernels.dispatch import attend
from mor_jax.models.layers.initializers import Axes, normal, param
from mor_jax.models.layers.masks import AttentionMask
from mor_jax.models.layers.remat import save_output
from mor_jax.models.layers.rope import Rotary, apply_rope
from mor_jax.models.layers.token_gather import TokenGather
from mor_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys (after the rotary embedding) and values of one layer, or of a stack of layers."""

    k: Float[Array, "*s b n g k"]
    v: Float[Array, "*s b n g k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceContext:
    """Where the tokens handed to a layer sit in their row.

    rotary: tables of these tokens.
    segments: their documents, 0 for padding; None: one document.
    index: their positions in the row, ascending; None: they are the whole row, in order.
    valid: False marks a filler slot, whose result is thrown away; None: there are none.
    """

    rotary: Rotary
    segments: Int[Array, "b c"] | None = None
    index: Int[Array, "b c"] | None = None
    valid: Bool[Array, "b c"] | None = None

    def select(
        self, index: Int[Array, "b c"], valid: Bool[Array, "b c"] | None
    ) -> "SequenceContext":
        """The scope of the tokens at row positions `index`; `self` must be the whole row."""
        rows = self.rotary
        taken = Rotary(*(_rows(table, index) for table in (rows.cos, rows.sin)))
        segments = None
        if self.segments is not None:
            segments = jnp.take_along_axis(self.segments, index, axis=1)
        return SequenceContext(taken, segments, index, valid)


def _rows(table: Float[Array, "_ l k"], index: Int[Array, "b c"]) -> Float[Array, "b c k"]:
    if table.shape[0] == 1:
        return jnp.take(table[0], index, axis=0)
    return jnp.take_along_axis(table, index[:, :, None], axis=1)


class Attention(nnx.Module):
    """Multi-head attention with fewer key/value heads than query heads; no biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, stacked: Axes = ()):
        init, d, k = normal(cfg), ("embed", cfg.hidden_size), ("head_dim", cfg.head_dim)
        heads, kv_heads = ("heads", cfg.num_heads), ("kv_heads", cfg.num_kv_heads)
        self.q = param(rngs, init, (d, heads, k), stacked)
        self.k = param(rngs, init, (d, kv_heads, k), stacked)
        self.v = param(rngs, init, (d, kv_heads, k), stacked)
        self.o = param(rngs, init, (heads, k, d), stacked)
        self.implementation: Implementation = cfg.attention

    def keys_values(self, x: Float[Array, "b n d"], scope: SequenceContext) -> KeyValue:
        """Keys and values of normalised tokens `x`."""
        k = jnp.einsum("bnd,dgk->bngk", x, self.k[...].astype(x.dtype))
        v = jnp.einsum("bnd,dgk->bngk", x, self.v[...].astype(x.dtype))
        return KeyValue(save_output(apply_rope(k, scope.rotary)), save_output(v))

    def __call__(
        self,
        x: Float[Array, "b c d"],
        scope: SequenceContext,
        shared: KeyValue | None,
        row: SequenceContext | None,
    ) -> tuple[Float[Array, "b c d"], KeyValue]:
        """Attends from normalised `x`; returns the output and the keys and values used.

        shared: keys and values of the whole row to attend to instead of the tokens' own.
        row: the scope of that whole row; only read when `shared` is given.
        """
        q = jnp.einsum("bcd,dhk->bchk", x, self.q[...].astype(x.dtype))
        q = save_output(apply_rope(q, scope.rotary))
        kv = self.keys_values(x, scope) if shared is None else shared
        visible = attention_mask(scope, None if shared is None else row)
        out = attend(q, kv.k, kv.v, visible, self.implementation)
        return jnp.einsum("bchk,hkd->bcd", out, self.o[...].astype(x.dtype)), kv

    def updated(
        self, x: Float[Array, "b c d"], scope: SequenceContext, shared: KeyValue
    ) -> KeyValue:
        """`shared` with the entries of the tokens in `scope` computed afresh from `x`."""
        fresh = self.keys_values(x, scope)
        if scope.index is None:
            return fresh
        rows = TokenGather.of(scope.index, scope.valid, shared.k.shape[1])
        return KeyValue(*(rows.scatter(old, new) for old, new in _pairs(shared, fresh)))


def _pairs(old: KeyValue, new: KeyValue):
    return zip((old.k, old.v), (new.k, new.v), strict=True)


def attention_mask(scope: SequenceContext, row: SequenceContext | None) -> AttentionMask:
    """Who sees whom: gathered tokens among themselves, or (given `row`) against the whole row.

    Gathered tokens keep their order, so among themselves plain causal order is the right one;
    filler slots stand last there and nobody sees them.
    """
    if row is None:
        return AttentionMask(None, scope.segments, scope.segments)
    return AttentionMask(scope.index, scope.segments, row.segments)
