"""Which keys a query sees: causal order, gathered tokens, packed documents.

Defines the description passed to every attention kernel, and the dense mask that it stands for.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.types import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Query i sees key j where j <= q_index[i] and both are in the same segment.

    q_index: position of each query among the keys, strictly ascending over all c slots of a
        sequence, padding included. So i <= q_index[i] <= n - c + i, and kernels skip the keys
        beyond without a check: another order gives finite but wrong numbers.
        `None`: query i is at position i, and there are as many queries as keys (causal
        self-attention; also right for gathered tokens among themselves, which keep their order).
    q_segments, k_segments: document numbers, 0 for padding; both or neither. A query that sees no
        key gets zeros and sends zero gradients.
    """

    q_index: Int[Array, "b c"] | None = None
    q_segments: Int[Array, "b c"] | None = None
    k_segments: Int[Array, "b n"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether this is causal self-attention over one document per sequence."""
        return self.q_index is None and self.q_segments is None


def check_mask(visible: AttentionMask, queries: int, keys: int) -> None:
    """Raises `ValueError` unless `visible` can describe `queries` (c) against `keys` (n)."""
    if (visible.q_segments is None) != (visible.k_segments is None):
        missing = "q_segments" if visible.q_segments is None else "k_segments"
        raise ValueError(
            f"visible.{missing}=None: queries and keys are compared by segment. Set both or neither"
        )
    if visible.q_index is None and queries != keys:
        raise ValueError(
            f"visible.q_index=None: needs as many queries as keys, got {queries} and {keys}. "
            "Set each query's position among the keys"
        )
    if queries > keys:
        raise ValueError(
            f"queries={queries}: more than the {keys} keys, so positions cannot be distinct. "
            "Pass the keys of the whole sequence"
        )


def visible_keys(
    visible: AttentionMask, queries: slice, keys: slice
) -> Bool[Array, "_ queries keys"]:
    """Dense mask of a range of queries against a range of keys.

    The leading axis has size 1 where all sequences share the mask, else b.
    """
    positions = jnp.arange(keys.start, keys.stop, dtype=jnp.int32)
    if visible.q_index is None:
        index = jnp.arange(queries.start, queries.stop, dtype=jnp.int32)[None]
    else:
        index = visible.q_index[:, queries]
    mask = positions[None, None, :] <= index[:, :, None]
    if visible.q_segments is None or visible.k_segments is None:
        return mask
    return mask & (visible.q_segments[:, queries, None] == visible.k_segments[:, None, keys])


def dense_mask(visible: AttentionMask, queries: int, keys: int) -> Bool[Array, "_ queries keys"]:
    """The whole mask; its leading axis is 1 or b."""
    return visible_keys(visible, slice(0, queries), slice(0, keys))


def sees_any(visible: AttentionMask) -> Bool[Array, "b c"] | None:
    """Queries with at least one visible key; `None` if all of them have one."""
    if visible.q_segments is None or visible.k_segments is None:
        return None
    queries, keys = visible.q_segments.shape[1], visible.k_segments.shape[1]
    return jnp.any(dense_mask(visible, queries, keys), axis=-1)
