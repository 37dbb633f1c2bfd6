"""Attention over pages, against the plain softmax over what the lists hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.models.decode.attention import Extent, Queue, Softmax, by_list, by_queue
from mor_jax.models.decode.paged_cache import CacheSlots, Pages, write

SIZE, PAGES, MOST, G, J, K = 4, 40, 5, 2, 3, 8


@pytest.fixture(scope="module")
def world():
    """Random pages; six lists of pages that share none; queries."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(PAGES, G, K, SIZE)).astype(np.float32)
    v = rng.normal(size=(PAGES, G, SIZE, K)).astype(np.float32)
    lists = rng.permutation(PAGES)[: 6 * MOST].reshape(6, MOST).astype(np.int32)
    q = rng.normal(size=(6, G, J, K)).astype(np.float32)
    return Pages(jnp.asarray(k), jnp.asarray(v)), lists, jnp.asarray(q)


def plainly(world, row, list_of, seen):
    """Softmax over the entries `seen` (numbers) of a list."""
    pages, lists, q = world
    k = np.concatenate([np.asarray(pages.k)[p] for p in lists[list_of]], axis=-1)[..., seen]
    v = np.concatenate([np.asarray(pages.v)[p] for p in lists[list_of]], axis=1)[:, seen]
    scores = np.einsum("gjk,gkt->gjt", np.asarray(q)[row], k)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("gjt,gtk->gjk", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("lengths", [(1, 4, 5, 0, 20, 13), (0, 0, 0, 0, 0, 3), (20,) * 6])
def test_a_queue_visits_what_every_row_sees_whatever_the_round(world, chunk, lengths):
    pages, lists, q = world

    def run(lengths):
        queue = Queue.of(jnp.asarray(lists), lengths, SIZE, chunk)
        return by_queue(Softmax.empty(q), q, pages, queue).result(
            jnp.dtype("float32")
        ), queue.rounds

    out, rounds = jax.jit(run)(jnp.asarray(lengths, jnp.int32))
    assert rounds == -(-sum(-(-n // SIZE) for n in lengths) // min(chunk, 6 * MOST))
    for row, length in enumerate(lengths):
        if length:
            right = plainly(world, row, row, np.arange(length))
            np.testing.assert_allclose(out[row], right, atol=2e-6)
        else:
            assert not np.asarray(out[row]).any()


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_rows_of_one_sequence_see_the_beginning_of_its_list(world, chunk):
    pages, lists, q = world
    lengths = (0, 3, 4, 9, 10, 20)
    extent = Extent(jnp.asarray(lists[2]), jnp.asarray(lengths, jnp.int32), chunk)
    out = by_list(Softmax.empty(q), q, pages, extent).result(jnp.dtype("float32"))
    assert not np.asarray(out[0]).any()
    for row, length in list(enumerate(lengths))[1:]:
        right = plainly(world, row, 2, np.arange(length))
        np.testing.assert_allclose(out[row], right, atol=2e-6)


def test_entries_beyond_their_reach_are_left_out(world):
    """Under updated sharing a replaced entry is not seen, whether pages come by queue or list."""
    pages, lists, q = world
    reach = np.random.default_rng(1).integers(0, 3, (PAGES, SIZE)).astype(np.int32)
    # A first page of which nothing is seen: the softmax must not start from it.
    reach[lists[0, 0]] = 2
    limits = (1, 0, 2, 1, 0, 1)
    queue = Queue.of(
        jnp.asarray(lists), jnp.full(6, 18, jnp.int32), SIZE, 4, jnp.asarray(limits, jnp.int32)
    )
    queued = by_queue(Softmax.empty(q), q, pages, queue, jnp.asarray(reach)).result(
        jnp.dtype("float32")
    )
    for row, limit in enumerate(limits):
        kept = np.flatnonzero(np.concatenate([reach[p] for p in lists[row]])[:18] <= limit)
        np.testing.assert_allclose(queued[row], plainly(world, row, row, kept), atol=2e-6)
        extent = Extent(jnp.asarray(lists[row]), jnp.full(6, 18, jnp.int32), 8)
        seen = (jnp.asarray(reach), jnp.asarray(limit))
        listed = by_list(Softmax.empty(q), q, pages, extent, seen).result(jnp.dtype("float32"))
        np.testing.assert_allclose(listed[row], queued[row], atol=2e-6)


def test_a_query_can_start_from_its_own_entry(world):
    pages, lists, q = world
    rng = np.random.default_rng(2)
    k, v = jnp.asarray(rng.normal(size=(2, 6, G, K)), jnp.float32)
    queue = Queue.of(jnp.asarray(lists), jnp.full(6, 6, jnp.int32), SIZE, 3)
    out = by_queue(Softmax.own(q, k, v), q, pages, queue).result(jnp.dtype("float32"))
    place = CacheSlots.of(jnp.asarray(lists), jnp.full(6, 6, jnp.int32), SIZE, jnp.ones(6, bool))
    stored = write(pages, place, k, v)
    for row in range(6):
        right = plainly((stored, lists, q), row, row, np.arange(7))
        np.testing.assert_allclose(out[row], right, atol=2e-6)


def test_rows_that_do_not_write_change_nothing(world):
    pages, lists, _ = world
    do = jnp.asarray([True, False, False, False, False, False])
    place = CacheSlots.of(jnp.asarray(lists), jnp.full(6, 2, jnp.int32), SIZE, do)
    ones = jnp.ones((6, G, K))
    after = write(pages, place, ones, ones)
    changed = np.argwhere(np.any(np.asarray(after.v != pages.v), axis=(1, 3)))
    assert changed.tolist() == [[lists[0, 0], 2]]
    assert (np.asarray(after.k)[lists[0, 0], :, :, 2] == 1).all()
