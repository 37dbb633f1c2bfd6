"""Which keys a query sees: causal order, gathered rows, packed documents.

Owns the description handed to every attention kernel, and the dense mask that it stands for.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.types import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Query i sees key j where j <= q_index[i] and both stand in the same segment.

    q_index: position in the row of keys that each query sits at. `None`: query i sits at position
        i, and there are as many queries as keys (plain causal self-attention; also right for
        gathered tokens among themselves, because they keep their order).
        Otherwise strictly ascending within a row, over ALL of its c entries, fillers included.
        So i <= q_index[i] <= n - c + i, and kernels skip keys beyond that bound without looking:
        a row that breaks the rule gets finite but wrong numbers.
    q_segments, k_segments: document numbers, 0 for padding; both or neither. A query whose
        segment has no visible key gets zeros, and sends zero gradients.
    """

    q_index: Int[Array, "b c"] | None = None
    q_segments: Int[Array, "b c"] | None = None
    k_segments: Int[Array, "b n"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether this is causal self-attention over one document a row."""
        return self.q_index is None and self.q_segments is None


def check_visibility(visible: Visibility, queries: int, keys: int) -> None:
    """Raises `ValueError` unless `visible` can describe `queries` (c) against `keys` (n)."""
    if (visible.q_segments is None) != (visible.k_segments is None):
        missing = "q_segments" if visible.q_segments is None else "k_segments"
        raise ValueError(
            f"visible.{missing}=None: queries and keys are compared by segment. Give both or none"
        )
    if visible.q_index is None and queries != keys:
        raise ValueError(
            f"visible.q_index=None: needs as many queries as keys, got {queries} and {keys}. "
            "Give each query's position among the keys"
        )
    if queries > keys:
        raise ValueError(
            f"queries={queries}: more than the {keys} keys, so positions cannot be distinct. "
            "Pass the whole row of keys"
        )


def visible_keys(
    visible: Visibility, rows: slice, columns: slice, *, causal: bool = True
) -> Bool[Array, "b c n"] | None:
    """Dense mask of queries `rows` against keys `columns`; `None` where nothing is hidden.

    The leading axis has size 1 where all sequences share the mask. `causal=False` leaves the order
    out, for blocks that lie below the diagonal as a whole.
    """
    mask = None
    if causal:
        positions = jnp.arange(columns.start, columns.stop, dtype=jnp.int32)
        if visible.q_index is None:
            index = jnp.arange(rows.start, rows.stop, dtype=jnp.int32)[None]
        else:
            index = visible.q_index[:, rows]
        mask = positions[None, None, :] <= index[:, :, None]
    if visible.q_segments is not None and visible.k_segments is not None:
        same = visible.q_segments[:, rows, None] == visible.k_segments[:, None, columns]
        mask = same if mask is None else mask & same
    return mask
