"""Paged attention whose work is proportional to the number of stored tokens.

The softmax is accumulated online (Milakov and Gimelshein 2018): the pages of all rows form one
queue, and a loop processes `chunk` pages of it at a time, whichever rows they belong to. The number
of its rounds depends on the current lengths of the lists, not on the longest row or the maximum
length of a sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.models.decode.paged_cache import Pages
from mor_jax.types import Array, Float, Int

_LOW = -1e30
"""In place of minus infinity, so that differences are 0 instead of NaN."""

_LIST_PARTS = 4
"""Rows of one sequence share their keys, so a round processes this many times fewer pages."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """Online softmax of n queries of g groups of j heads: maximum, sum, weighted values so far."""

    top: Float[Array, "n g j"]
    total: Float[Array, "n g j"]
    mixed: Float[Array, "n g j k"]

    @classmethod
    def empty(cls, q: Float[Array, "n g j k"]) -> "Softmax":
        """The state before the first key."""
        shape = q.shape[:3]
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full(shape, _LOW), zeros, jnp.zeros(q.shape, jnp.float32))

    @classmethod
    def own(
        cls, q: Float[Array, "n g j k"], k: Float[Array, "n g k"], v: Float[Array, "n g k"]
    ) -> "Softmax":
        """The state after each query has attended to its own key and value."""
        top = _scores("ngjk,ngk->ngj", q, k)
        mixed = jnp.broadcast_to(v[:, :, None].astype(jnp.float32), q.shape)
        return cls(top, jnp.ones_like(top), mixed)

    def result(self, dtype: jnp.dtype) -> Float[Array, "n g j k"]:
        """The output of attention; zero for a query that saw no key."""
        return (self.mixed / jnp.maximum(self.total, 1e-37)[..., None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """Pages to attend to, one per item, in `rounds` rounds of `chunk` items.

    row: the query's row. page: number of the page. used: valid entries of the page, 0 for items
    that pad a round. limit: entries whose `reach` exceeds it are hidden (updated sharing), or None.
    """

    row: Int[Array, "w"]
    page: Int[Array, "w"]
    used: Int[Array, "w"]
    limit: Int[Array, "w"] | None
    rounds: Int[Array, ""]
    chunk: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        lists: Int[Array, "n m"],
        lengths: Int[Array, "n"],
        size: int,
        chunk: int,
        limit: Int[Array, "n"] | None = None,
    ) -> "Queue":
        """The first `lengths` entries of each row's list. size: tokens per page."""
        n, m = lists.shape
        chunk = min(chunk, n * m)
        items = -(-n * m // chunk) * chunk
        pages = (lengths + size - 1) // size
        ends = jnp.cumsum(pages)
        item = jnp.arange(items, dtype=jnp.int32)
        how = "compare_all" if items * n <= 2**20 else "scan"
        row = jnp.searchsorted(ends, item, side="right", method=how).astype(jnp.int32)
        row = jnp.minimum(row, n - 1)
        number = item - (ends - pages)[row]
        used = jnp.clip(lengths[row] - number * size, 0, size)
        page = lists[row, jnp.clip(number, 0, m - 1)]
        rounds = (ends[-1] + chunk - 1) // chunk
        used = jnp.where(item < ends[-1], used, 0)
        return cls(row, page, used, None if limit is None else limit[row], rounds, chunk)


def by_queue(
    before: Softmax,
    q: Float[Array, "n g j k"],
    pages: Pages,
    queue: Queue,
    reach: Int[Array, "p t"] | None = None,
) -> Softmax:
    """Adds the pages of `queue` to the softmax state `before`. q: scaled queries."""
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)

    def visit(i: Array, state: Softmax) -> Softmax:
        row, page, used = (_cut(x, i, queue.chunk) for x in (queue.row, queue.page, queue.used))
        seen = jnp.arange(pages.v.shape[2], dtype=jnp.int32)[None] < used[:, None]
        if queue.limit is not None and reach is not None:
            seen &= _pick(reach, page) <= _cut(queue.limit, i, queue.chunk)[:, None]
        mask = seen[:, None, None]
        scores = _scores("pgjk,pgkt->pgjt", _pick(q, row), _pick(pages.k, page))
        scores = jnp.where(mask, scores, _LOW)
        mine = (rows[:, None] == row[None]) & (used > 0)[None]
        best = jnp.where(mine[:, :, None, None], jnp.max(scores, -1)[None], _LOW)
        top = jnp.maximum(state.top, jnp.max(best, axis=1))
        weight = jnp.exp(scores - _pick(top, row)[..., None])
        if queue.limit is not None:
            # All entries of a row's first pages may be hidden; otherwise hidden ones are far below
            # `top`.
            weight = jnp.where(mask, weight, 0.0)
        values = _pick(pages.v, page)
        mixed = _scores("pgjt,pgtk->pgjk", weight.astype(values.dtype), values)
        # One matrix product sums the items of each row; a scatter would add them one by one.
        whose = mine.astype(jnp.float32)
        old = jnp.exp(state.top - top)
        return Softmax(
            top,
            state.total * old + _sum(whose, jnp.sum(weight, -1)),
            state.mixed * old[..., None] + _sum(whose, mixed),
        )

    return jax.lax.fori_loop(0, queue.rounds, visit, before)


@dataclasses.dataclass(frozen=True)
class Extent:
    """Pages of one list, of which each of n rows sees the first `lengths` entries."""

    pages: Int[Array, "m"]
    lengths: Int[Array, "n"]
    chunk: int


def by_list(
    before: Softmax,
    q: Float[Array, "n g j k"],
    pages: Pages,
    extent: Extent,
    seen: tuple[Int[Array, "p t"], Array] | None = None,
) -> Softmax:
    """Adds the list of one sequence to the softmax state `before` of its rows.

    seen: `reach`, and the limit beyond which entries are hidden.
    """
    size, m, lengths = pages.v.shape[2], extent.pages.shape[0], extent.lengths
    n, g, j, k = q.shape
    chunk = max(1, min(extent.chunk // _LIST_PARTS, m))
    tokens = chunk * size
    padded = jnp.pad(extent.pages, (0, -m % chunk))
    # With all queries of a group side by side, each round is two matrix products per group.
    queries = jnp.moveaxis(q, 1, 0).reshape(g, n * j, k)
    last = jnp.repeat(lengths, j)

    def visit(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = state
        page = _cut(padded, i, chunk)
        keys = jnp.moveaxis(_pick(pages.k, page), 0, 2).reshape(g, k, tokens)
        values = jnp.moveaxis(_pick(pages.v, page), 0, 1).reshape(g, tokens, k)
        entry = i * tokens + jnp.arange(tokens, dtype=jnp.int32)
        mask = entry[None] < last[:, None]
        if seen is not None:
            mask &= _pick(seen[0], page).reshape(1, tokens) <= seen[1]
        scores = jnp.where(mask[None], _scores("gqk,gkt->gqt", queries, keys), _LOW)
        best = jnp.maximum(top, jnp.max(scores, axis=-1))
        weight = jnp.where(mask[None], jnp.exp(scores - best[..., None]), 0.0)
        old = jnp.exp(top - best)
        more = _scores("gqt,gtk->gqk", weight.astype(values.dtype), values)
        return best, total * old + jnp.sum(weight, -1), mixed * old[..., None] + more

    start = tuple(
        jnp.moveaxis(x, 1, 0).reshape(g, n * j, *x.shape[3:])
        for x in (before.top, before.total, before.mixed)
    )
    rounds = (jnp.max(lengths) + tokens - 1) // tokens
    done = jax.lax.fori_loop(0, rounds, visit, start)
    return Softmax(*(jnp.moveaxis(x.reshape(g, n, j, *x.shape[2:]), 0, 1) for x in done))


def _cut(x: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk)


def _pick(x: Array, index: Int[Array, "c"]) -> Array:
    return jnp.take(x, index, axis=0, mode="clip")


def _scores(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _sum(whose: Float[Array, "n c"], items: Float[Array, "c g ..."]) -> Float[Array, "n g ..."]:
    flat = whose @ items.reshape(items.shape[0], -1)
    return flat.reshape(-1, *items.shape[1:])
