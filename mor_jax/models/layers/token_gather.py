"""Gathers selected tokens of a sequence and scatters them back, without a scatter of activations.

Selected tokens are distinct, so the transpose of a gather is again a gather, through the inverse
index. Gathers are fast on accelerators and CPUs, and they keep routed tokens inside their batch
shard: no collective carries activations.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.types import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenGather:
    """c distinct tokens of n: the `index` of each slot, and the `slot` of each `selected` token.

    Padding slots have an index too, but the token there is not `selected`.
    """

    index: Int[Array, "b c"]
    slot: Int[Array, "b n"]
    selected: Bool[Array, "b n"]

    @classmethod
    def of(
        cls, index: Int[Array, "b c"], valid: Bool[Array, "b c"] | None, n: int
    ) -> "TokenGather":
        """From the tokens' indices, distinct within a sequence.

        valid: False marks padding slots, which are gathered but never scattered; None: there are
        none.
        """
        b, c = index.shape
        order = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32)[None], (b, c))
        slot = scatter_to(order, index, n)
        selected = scatter_to(jnp.ones((b, c), bool) if valid is None else valid, index, n)
        return cls(index, slot, selected)

    def gather(self, x: Array) -> Array:
        """Tokens [b n ...] -> slots [b c ...]. Padding slots send no gradient back."""
        return _gather(x, self)

    def scatter(self, x: Array, slots: Array) -> Array:
        """x [b n ...] with the selected tokens replaced by their slots [b c ...]."""
        return _scatter(x, slots, self)


def scatter_to(values: Array, index: Int[Array, "b c"], n: int) -> Array:
    """Zeros [b n] with `values` [b c] at `index`, which is distinct within a sequence.

    Mapped over the batch: a scatter with an explicit batch axis needs no collective.
    """

    def one(values: Array, index: Array) -> Array:
        return jnp.zeros(n, values.dtype).at[index].set(values, unique_indices=True)

    return jax.vmap(one)(values, index)


def _pick(x: Array, index: Int[Array, "b m"]) -> Array:
    expanded = index.reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, expanded, axis=1, mode="promise_in_bounds")


def where_tokens(condition: Bool[Array, "..."], x: Array, y: Array) -> Array:
    """Whole tokens: those of `x` where `condition`, else of `y`; it has their leading axes."""
    return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y)


@jax.custom_vjp
def _gather(x: Array, tokens: TokenGather) -> Array:
    return _pick(x, tokens.index)


def _gather_fwd(x: Array, tokens: TokenGather) -> tuple[Array, TokenGather]:
    return _pick(x, tokens.index), tokens


def _gather_bwd(tokens: TokenGather, grad: Array) -> tuple[Array, TokenGather]:
    scattered = _pick(grad, tokens.slot)
    zeros = jnp.zeros_like(scattered)
    return where_tokens(tokens.selected, scattered, zeros), _no_gradient(tokens)


@jax.custom_vjp
def _scatter(x: Array, slots: Array, tokens: TokenGather) -> Array:
    return where_tokens(tokens.selected, _pick(slots, tokens.slot), x)


def _scatter_fwd(x: Array, slots: Array, tokens: TokenGather) -> tuple[Array, TokenGather]:
    return _scatter(x, slots, tokens), tokens


def _scatter_bwd(tokens: TokenGather, grad: Array) -> tuple[Array, Array, TokenGather]:
    d_x = where_tokens(tokens.selected, jnp.zeros_like(grad), grad)
    # The token of a padding slot is not `selected`, so the slot's gradient is zero.
    replaced = where_tokens(tokens.selected, grad, jnp.zeros_like(grad))
    return d_x, _pick(replaced, tokens.index), _no_gradient(tokens)


def _no_gradient(tokens: TokenGather) -> TokenGather:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tokens)


_gather.defvjp(_gather_fwd, _gather_bwd)
_scatter.defvjp(_scatter_fwd, _scatter_bwd)
