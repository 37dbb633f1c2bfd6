"""Runs rows through layers with a KV cache: which entries they write, and which they see."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.decode.attention import Extent, Queue, Softmax, by_list, by_queue
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import Layer, apply
from mor_jax.models.decode.paged_cache import Cache, CacheSlots, KVCacheSpec, Pages, write
from mor_jax.models.layers.rope import RotaryTables
from mor_jax.types import Array, Bool, Float, Int

Lists = Int[Array, "n m"] | Int[Array, "m"]
"""Page numbers of one list per row, or of one list that all rows share."""

_ALWAYS = 127
"""A limit that no token's reach exceeds."""


@dataclasses.dataclass(frozen=True)
class AttentionAccess:
    """How rows use the pages of layers. place: slots that they write. see: attends to entries."""

    place: CacheSlots
    see: Callable[[Float[Array, "n g j k"], Pages], Softmax]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """n rows of different sequences. valid: False marks padding rows.

    slot: row of the block tables. position: in the sequence, from 0.
    """

    slot: Int[Array, "n"]
    position: Int[Array, "n"]
    valid: Bool[Array, "n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """n rows of one sequence, in order; padding may be anywhere. Fields as in `DecodeBatch`."""

    slot: Int[Array, ""]
    position: Int[Array, "n"]
    valid: Bool[Array, "n"]


def run_layers(
    cfg: ModelConfig,
    layers: Sequence[Layer],
    pages: Sequence[Pages],
    x: Float[Array, "n d"],
    at: tuple[RotaryTables, Array | int],
    access: AttentionAccess,
) -> tuple[Float[Array, "n d"], tuple[Pages, ...]]:
    """Runs n rows through `layers`, each with its pages; first writes the entries of the rows."""
    written: list[Pages] = []

    def mix(q: Array, k: Array, v: Array) -> Array:
        updated = write(pages[len(written)], access.place, k, v)
        written.append(updated)
        return access.see(q, updated).result(q.dtype)

    for layer in layers:
        x = apply(cfg, layer, x, at, mix)
    return x, tuple(written)


def all_tokens(
    geometry: KVCacheSpec, lists: Lists, rows: DecodeBatch | PrefillChunk, chunk: int
) -> AttentionAccess:
    """Access to a list that holds every token, so that entry i is position i."""
    see = _reader(geometry, lists, jnp.where(rows.valid, rows.position + 1, 0), chunk)
    place = _place(geometry, lists, rows.position, rows.valid)
    return AttentionAccess(place, lambda q, pages: see(Softmax.empty(q), q, pages))


def block(
    decoder: Decoder,
    cache: Cache,
    rows: DecodeBatch | PrefillChunk,
    x: Float[Array, "n d"],
    at: tuple[RotaryTables, Int[Array, "n"] | Int[Array, ""]],
    counts: Int[Array, "n"],
) -> tuple[Float[Array, "n d"], Cache]:
    """Runs rows once through the shared block. at: their rotary tables and recursions.

    counts: entries in the list of each row before the row's own.
    """
    geometry, recursion = decoder.geometry, at[1]
    tables = decoder.tables.block[rows.slot]
    first, chunk, reach = tables[..., 0, :], decoder.chunk, cache.reach
    if geometry.cfg.kv_mode == "shared":
        access = all_tokens(geometry, first, rows, chunk)
        writes = rows.valid & (recursion == 0)
        access = dataclasses.replace(access, place=_place(geometry, first, rows.position, writes))
    elif geometry.updates:
        whole = _place(geometry, first, rows.position, rows.valid)
        entered = jnp.broadcast_to(recursion, whole.page.shape).astype(jnp.int8)
        reach = reach.at[whole.page, whole.offset].set(entered, mode="drop")
        access = _updated(decoder, reach, rows, recursion, counts)
    else:
        own = _own(tables, recursion)
        see = _reader(geometry, own, jnp.where(rows.valid, counts + 1, 0), chunk)
        place = _place(geometry, own, counts, rows.valid)
        access = AttentionAccess(place, lambda q, pages: see(Softmax.empty(q), q, pages))
    x, pages = run_layers(geometry.cfg, decoder.weights.block, cache.block, x, at, access)
    return x, dataclasses.replace(cache, block=pages, reach=reach)


def _updated(
    decoder: Decoder,
    reach: Int[Array, "p t"],
    rows: DecodeBatch | PrefillChunk,
    recursion: Int[Array, "n"] | Int[Array, ""],
    counts: Int[Array, "n"],
) -> AttentionAccess:
    """Access for updated sharing: recursion 0's entries unless replaced, and the recursion's own.

    reach: includes the rows themselves already.
    """
    geometry, chunk = decoder.geometry, decoder.chunk
    tables = decoder.tables.block[rows.slot]
    own = _own(tables, recursion)
    limit = jnp.where(recursion == 0, _ALWAYS, recursion - 1)
    before = jnp.where(rows.valid, rows.position + 1, 0)
    later = jnp.where(rows.valid & (recursion > 0), counts + 1, 0)
    first = _reader(geometry, tables[..., 0, :], before, chunk, (reach, limit))
    fresh = _reader(geometry, own, later, chunk)
    place = _place(geometry, own, counts, rows.valid)
    return AttentionAccess(
        place, lambda q, pages: fresh(first(Softmax.empty(q), q, pages), q, pages)
    )


def _reader(
    geometry: KVCacheSpec,
    lists: Lists,
    lengths: Int[Array, "n"],
    chunk: int,
    within: tuple[Int[Array, "p t"], Array] | None = None,
) -> Callable[[Softmax, Array, Pages], Softmax]:
    """A function that attends to the first `lengths` entries of one list per row, or of one list.

    within: `reach`, and the limit beyond which entries are hidden.
    """
    reach, limit = (None, None) if within is None else within
    if lists.ndim == 1:
        extent = Extent(lists, lengths, chunk)
        return lambda before, q, pages: by_list(before, q, pages, extent, within)
    queue = Queue.of(lists, lengths, geometry.size, chunk, limit)
    return lambda before, q, pages: by_queue(before, q, pages, queue, reach)


def _place(geometry: KVCacheSpec, lists: Lists, index: Int[Array, "n"], do: Array) -> CacheSlots:
    """Slot of entry `index` of each row's list, for the rows where `do` is True."""
    each = jnp.broadcast_to(jnp.atleast_2d(lists), (index.shape[0], lists.shape[-1]))
    return CacheSlots.of(each, index, geometry.size, do)


def _own(tables: Array, recursion: Int[Array, "n"] | Int[Array, ""]) -> Lists:
    """The list of each row's recursion, or of the recursion of all rows."""
    if tables.ndim == 2:
        return tables[recursion]
    return jnp.take_along_axis(tables, recursion[:, None, None], axis=1)[:, 0]
