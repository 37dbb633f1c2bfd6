"""Grouped-query attention: projections, rotary embedding, and one call of the kernel.

Keys and values come from the tokens themselves or are passed in (KV sharing, paper section 2.2.2).
`SequenceContext` describes which keys a query sees.
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
from mor_jax.models.layers.rope import RotaryTables, apply_rope
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
    """Positions and documents of the tokens passed to a layer.

    rotary: rotary tables of these tokens.
    segments: their documents, 0 for padding; None: one document.
    index: their positions in the sequence, ascending; None: they are the whole sequence, in order.
    valid: False marks a padding slot, whose result is discarded; None: there are none.
    """

    rotary: RotaryTables
    segments: Int[Array, "b c"] | None = None
    index: Int[Array, "b c"] | None = None
    valid: Bool[Array, "b c"] | None = None

    def select(
        self, index: Int[Array, "b c"], valid: Bool[Array, "b c"] | None
    ) -> "SequenceContext":
        """Context of the tokens at positions `index`; `self` must be the whole sequence."""
        rotary = RotaryTables(
            *(_gather_table(table, index) for table in (self.rotary.cos, self.rotary.sin))
        )
        segments = None
        if self.segments is not None:
            segments = jnp.take_along_axis(self.segments, index, axis=1)
        return SequenceContext(rotary, segments, index, valid)


def _gather_table(table: Float[Array, "_ l k"], index: Int[Array, "b c"]) -> Float[Array, "b c k"]:
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

    def keys_values(self, x: Float[Array, "b n d"], context: SequenceContext) -> KeyValue:
        """Keys and values of normalised tokens `x`."""
        k = jnp.einsum("bnd,dgk->bngk", x, self.k[...].astype(x.dtype))
        v = jnp.einsum("bnd,dgk->bngk", x, self.v[...].astype(x.dtype))
        return KeyValue(save_output(apply_rope(k, context.rotary)), save_output(v))

    def __call__(
        self,
        x: Float[Array, "b c d"],
        context: SequenceContext,
        shared_kv: KeyValue | None,
        sequence: SequenceContext | None,
    ) -> tuple[Float[Array, "b c d"], KeyValue]:
        """Attends from normalised `x`; returns the output and the keys and values used.

        shared_kv: keys and values of the whole sequence, to attend to instead of the tokens' own.
        sequence: context of that whole sequence; read only together with `shared_kv`.
        """
        q = jnp.einsum("bcd,dhk->bchk", x, self.q[...].astype(x.dtype))
        q = save_output(apply_rope(q, context.rotary))
        kv = self.keys_values(x, context) if shared_kv is None else shared_kv
        visible = attention_mask(context, None if shared_kv is None else sequence)
        out = attend(q, kv.k, kv.v, visible, self.implementation)
        return jnp.einsum("bchk,hkd->bcd", out, self.o[...].astype(x.dtype)), kv

    def updated(
        self, x: Float[Array, "b c d"], context: SequenceContext, shared_kv: KeyValue
    ) -> KeyValue:
        """`shared_kv` with the entries of the tokens in `context` recomputed from `x`."""
        fresh = self.keys_values(x, context)
        if context.index is None:
            return fresh
        gathered = TokenGather.of(context.index, context.valid, shared_kv.k.shape[1])
        return KeyValue(*(gathered.scatter(old, new) for old, new in _pairs(shared_kv, fresh)))


def _pairs(old: KeyValue, new: KeyValue):
    return zip((old.k, old.v), (new.k, new.v), strict=True)


def attention_mask(context: SequenceContext, sequence: SequenceContext | None) -> AttentionMask:
    """Mask of the tokens against themselves, or, given `sequence`, against the whole sequence.

    Gathered tokens keep their order, so plain causal order is right among themselves; padding
    slots come last there, where no valid query sees them.
    """
    if sequence is None:
        return AttentionMask(None, context.segments, context.segments)
    return AttentionMask(context.index, context.segments, sequence.segments)
