"""Rows through layers whose past is in the cache: where they write, and what they see."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.cached.attention import Extent, Queue, Softmax, by_list, by_queue
from mor_jax.models.cached.layer import Layer, apply
from mor_jax.models.cached.pages import Cache, Geometry, Pages, Place, write
from mor_jax.models.rope import Rotary
from mor_jax.types import Array, Bool, Float, Int

_ALWAYS = 127
"""A limit that no token's reach is beyond."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How rows use the pages of a pool's layers. place: where theirs go. see: what they read."""

    place: Place
    see: Callable[[Float[Array, "n g j k"], Pages], Softmax]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """n rows of different sequences. live: False marks rows that only fill the shape.

    slot: whose tables they use. position: in their sequence, from 0.
    """

    slot: Int[Array, "n"]
    position: Int[Array, "n"]
    live: Bool[Array, "n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """n rows of one sequence, in order, the live ones first or spread. Members as in `Rows`."""

    slot: Int[Array, ""]
    position: Int[Array, "n"]
    live: Bool[Array, "n"]


def through(
    cfg: ModelConfig,
    layers: Sequence[Layer],
    pages: Sequence[Pages],
    x: Float[Array, "n d"],
    at: tuple[Rotary, Array | int],
    look: Look,
) -> tuple[Float[Array, "n d"], tuple[Pages, ...]]:
    """n rows through all `layers`, each with its pages; the rows' entries are written before."""
    written: list[Pages] = []

    def mix(q: Array, k: Array, v: Array) -> Array:
        here = write(pages[len(written)], look.place, k, v)
        written.append(here)
        return look.see(q, here).result(q.dtype)

    for layer in layers:
        x = apply(cfg, layer, x, at, mix)
    return x, tuple(written)


def all_tokens(
    geometry: Geometry, lists: Int[Array, "n m"] | Int[Array, "m"], rows: Rows | Piece, chunk: int
) -> Look:
    """For a list that every token is in, where its index is its position."""
    return list_look(geometry, lists, (rows.position, rows.position + 1), rows.live, chunk)


def list_look(
    geometry: Geometry,
    lists: Int[Array, "n m"] | Int[Array, "m"],
    entries: tuple[Int[Array, "n"], Int[Array, "n"]],
    live: Bool[Array, "n"],
    chunk: int,
    writes: Bool[Array, "n"] | Bool[Array, ""] | None = None,
) -> Look:
    """For one list a row (or one of all rows): entry to write, and how many are seen.

    writes: rows that write, where those are not all live ones. chunk: pages of a round.
    """
    index, seen = entries
    seen = jnp.where(live, seen, 0)
    do = live if writes is None else writes & live
    if lists.ndim == 1:
        each = jnp.broadcast_to(lists[None], (index.shape[0], lists.shape[0]))

        def see_list(q: Array, pages: Pages) -> Softmax:
            return by_list(Softmax.empty(q), q, pages, Extent(lists, seen, chunk))

        return Look(Place.of(each, index, geometry.size, do), see_list)
    queue = Queue.of(lists, seen, geometry.size, chunk)

    def see(q: Array, pages: Pages) -> Softmax:
        return by_queue(Softmax.empty(q), q, pages, queue)

    return Look(Place.of(lists, index, geometry.size, do), see)


def block_look(
    geometry: Geometry,
    tables: Int[Array, "n lists m"] | Int[Array, "lists m"],
    rows: Rows | Piece,
    recursion: Int[Array, "n"] | Int[Array, ""],
    counts: Int[Array, "n"],
    chunk: int,
) -> Look:
    """For rows at `recursion`. counts: entries that its list holds before each of the rows."""
    if geometry.cfg.kv == "shared":
        first = tables[:, 0] if tables.ndim == 3 else tables[0]
        entries = (rows.position, rows.position + 1)
        return list_look(geometry, first, entries, rows.live, chunk, recursion == 0)
    if tables.ndim == 3:
        own = jnp.take_along_axis(tables, recursion[:, None, None], axis=1)[:, 0]
    else:
        own = tables[recursion]
    return list_look(geometry, own, (counts, counts + 1), rows.live, chunk)


def updated_look(
    geometry: Geometry,
    tables: Int[Array, "n lists m"] | Int[Array, "lists m"],
    rows: Rows | Piece,
    recursion: Int[Array, "n"] | Int[Array, ""],
    counts: Int[Array, "n"],
    chunk: int,
) -> tuple[Callable[[Int[Array, "p t"]], Look], Place]:
    """For updated sharing: recursion 0's entries that are not replaced, and the list's own.

    Returns the look, made from `reach` once that holds the rows themselves, and their entries in
    list 0, where it is kept.
    """
    own = block_look(geometry, tables, rows, recursion, counts, chunk)
    limit = jnp.where(recursion == 0, _ALWAYS, recursion - 1)
    seen = jnp.where(rows.live, rows.position + 1, 0)
    later = jnp.where(recursion == 0, 0, jnp.where(rows.live, counts + 1, 0))
    if tables.ndim == 2:
        first, mine = tables[0], tables[recursion]
        each = jnp.broadcast_to(first[None], (seen.shape[0], first.shape[0]))

        def of_list(reach: Array) -> Look:
            def see(q: Array, pages: Pages) -> Softmax:
                whole, fresh = Extent(first, seen, chunk), Extent(mine, later, chunk)
                kept = by_list(Softmax.empty(q), q, pages, whole, (reach, limit))
                return by_list(kept, q, pages, fresh)

            return Look(own.place, see)

        return of_list, Place.of(each, rows.position, geometry.size, rows.live)
    first = tables[:, 0]
    mine = jnp.take_along_axis(tables, recursion[:, None, None], axis=1)[:, 0]
    whole = Queue.of(first, seen, geometry.size, chunk, limit)
    fresh = Queue.of(mine, later, geometry.size, chunk)

    def of_queue(reach: Array) -> Look:
        def see(q: Array, pages: Pages) -> Softmax:
            return by_queue(by_queue(Softmax.empty(q), q, pages, whole, reach), q, pages, fresh)

        return Look(own.place, see)

    return of_queue, Place.of(first, rows.position, geometry.size, rows.live)


def block(
    geometry: Geometry,
    layers: Sequence[Layer],
    cache: Cache,
    x: Float[Array, "n d"],
    at: tuple[Rotary, Int[Array, "n"] | Int[Array, ""]],
    look: Look | tuple[Callable[[Int[Array, "p t"]], Look], Place],
) -> tuple[Float[Array, "n d"], Cache]:
    """Rows once through the shared block. look: of `block_look`, or of `updated_look`."""
    reach = cache.reach
    if isinstance(look, tuple):
        make, place = look
        entered = jnp.broadcast_to(at[1], place.page.shape).astype(jnp.int8)
        reach = reach.at[place.page, place.offset].set(entered, mode="drop")
        look = make(reach)
    x, pages = through(geometry.cfg, layers, cache.block, x, at, look)
    return x, dataclasses.replace(cache, block=pages, reach=reach)
