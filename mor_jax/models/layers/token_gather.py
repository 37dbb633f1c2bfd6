"""Taking chosen rows out of a sequence and putting them back, without a scatter of activations.

Chosen rows are distinct, so the transpose of a gather is again a gather, through the inverse
index. That is what accelerators and CPUs do fast, and it keeps routed tokens inside their batch
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
    """c distinct rows of n: `index` of each slot, and for each row its `slot`, if `chosen`.

    valid: False marks filler slots, which are read but never put back; None: there are none.
    """

    index: Int[Array, "b c"]
    slot: Int[Array, "b n"]
    chosen: Bool[Array, "b n"]

    @classmethod
    def of(
        cls, index: Int[Array, "b c"], valid: Bool[Array, "b c"] | None, n: int
    ) -> "TokenGather":
        """From the rows' indices, distinct within a sequence."""
        b, c = index.shape
        order = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32)[None], (b, c))
        slot = scatter_to(order, index, n)
        chosen = scatter_to(jnp.ones((b, c), bool) if valid is None else valid, index, n)
        return cls(index, slot, chosen)

    def gather(self, x: Array) -> Array:
        """Rows [b n ...] -> slots [b c ...]. Filler slots send no gradient back."""
        return _take(x, self)

    def scatter(self, x: Array, slots: Array) -> Array:
        """x [b n ...] with the chosen rows replaced by their slots [b c ...]."""
        return _put(x, slots, self)


def scatter_to(values: Array, index: Int[Array, "b c"], n: int) -> Array:
    """Rows of n zeros with `values` [b c] at `index`, which is distinct within a row.

    Mapped over the batch, because a scatter that names its batch axis stays on every device.
    """

    def one(values: Array, index: Array) -> Array:
        return jnp.zeros(n, values.dtype).at[index].set(values, unique_indices=True)

    return jax.vmap(one)(values, index)


def _pick(x: Array, index: Int[Array, "b m"]) -> Array:
    expanded = index.reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, expanded, axis=1, mode="promise_in_bounds")


def where_rows(chosen: Bool[Array, "..."], yes: Array, no: Array) -> Array:
    """Whole rows: those of `yes` where `chosen`, else of `no`; `chosen` has their leading axes."""
    return jnp.where(chosen.reshape(chosen.shape + (1,) * (yes.ndim - chosen.ndim)), yes, no)


@jax.custom_vjp
def _take(x: Array, rows: TokenGather) -> Array:
    return _pick(x, rows.index)


def _take_fwd(x: Array, rows: TokenGather) -> tuple[Array, TokenGather]:
    return _pick(x, rows.index), rows


def _take_bwd(rows: TokenGather, grad: Array) -> tuple[Array, TokenGather]:
    spread = _pick(grad, rows.slot)
    return where_rows(rows.chosen, spread, jnp.zeros_like(spread)), _no_gradient(rows)


@jax.custom_vjp
def _put(x: Array, slots: Array, rows: TokenGather) -> Array:
    return where_rows(rows.chosen, _pick(slots, rows.slot), x)


def _put_fwd(x: Array, slots: Array, rows: TokenGather) -> tuple[Array, TokenGather]:
    return _put(x, slots, rows), rows


def _put_bwd(rows: TokenGather, grad: Array) -> tuple[Array, Array, TokenGather]:
    kept = where_rows(rows.chosen, jnp.zeros_like(grad), grad)
    # A filler slot was never put anywhere: its row is not `chosen`, so its gradient is zero.
    replaced = where_rows(rows.chosen, grad, jnp.zeros_like(grad))
    return kept, _pick(replaced, rows.index), _no_gradient(rows)


def _no_gradient(rows: TokenGather) -> TokenGather:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), rows)


_take.defvjp(_take_fwd, _take_bwd)
_put.defvjp(_put_fwd, _put_bwd)
