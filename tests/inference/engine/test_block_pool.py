"""Accounting of cache blocks: none is lost, none is held twice, a refusal takes nothing."""

import collections

import numpy as np
import pytest
from support.tiny import TINY

from mor_jax.inference.config import CachePlan
from mor_jax.inference.engine.block_pool import BlockAllocator, BlockPool
from mor_jax.models.decode.paged_cache import KVCacheSpec

SIZE, SLOTS, LISTS, LENGTH = 4, 3, 3, 20


def allocator(end_pages=10, block_pages=14, name="expert"):
    spec = KVCacheSpec(TINY[name], SIZE)
    return BlockAllocator(CachePlan(spec, SLOTS, end_pages, block_pages, LENGTH, (1.0,) * LISTS))


def test_a_pool_gives_every_block_once():
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4] and pool.free == 0
    assert pool.allocate(0) == [] and pool.allocate(1) is None
    pool.free_blocks(second)
    assert pool.free == 3 and sorted(pool.allocate(3)) == sorted(second)


def test_a_pool_with_too_few_blocks_keeps_them():
    pool = BlockPool(5)
    held = pool.allocate(2)
    assert pool.allocate(4) is None
    assert pool.free == 3 and not set(pool.allocate(3)) & set(held)


@pytest.mark.parametrize(("ends", "lists"), [(11, (1, 1, 1)), (5, (5, 5, 5)), (0, (15, 0, 0))])
def test_a_reservation_that_does_not_fit_takes_nothing_of_either_pool(ends, lists):
    made = allocator()
    made.changed = False
    assert made.reserve(0, ends, lists) is None
    assert made.used == (0, 0) and not made.changed
    assert (
        not made.capacity_tokens.any() and not made.end_table.any() and not made.block_table.any()
    )
    # All of both pools can still be had.
    assert made.reserve(0, 5, (5, 2, 0)) and made.reserve(1, 5, (5, 2, 0))
    assert made.used == (10, 14)


def test_the_tables_show_what_a_sequence_holds():
    made = allocator()
    made.reserve(0, 3, (3, 2, 1))
    made.changed = False
    held = made.reserve(2, 5, (4, 0, 2))
    assert made.changed
    assert [len(held.ends), *map(len, held.block)] == [5, 4, 0, 2]
    np.testing.assert_array_equal(made.end_table[2, :5], held.ends)
    for number, count in enumerate((4, 0, 2)):
        np.testing.assert_array_equal(made.block_table[2, number, :count], held.block[number])
    # Room is counted in tokens, four a block; another slot's is left alone.
    assert made.capacity_tokens.tolist() == [[12, 8, 4], [0, 0, 0], [16, 0, 8], [0, 0, 0]]


def test_a_list_grows_by_one_block_until_none_is_free():
    made = allocator(block_pages=6)
    held = made.reserve(1, 2, (2, 1, 1))
    before = [list(pages) for pages in held.block]
    made.changed = False
    assert made.extend(1, held, 2) and made.changed
    assert made.extend(1, held, 0)
    assert [len(pages) for pages in held.block] == [3, 1, 2]
    assert [pages[: len(old)] for pages, old in zip(held.block, before, strict=True)] == before
    assert made.capacity_tokens[1].tolist() == [12, 4, 8]
    made.changed = False
    assert not made.extend(1, held, 1) and not made.changed
    assert made.capacity_tokens[1].tolist() == [12, 4, 8] and made.used == (2, 6)
    made.release(held)
    assert made.used == (0, 0)


def test_a_slot_that_is_used_again_shows_its_new_blocks():
    made = allocator()
    made.release(made.reserve(0, 5, (5, 4, 3)))
    other = made.reserve(1, 1, (1, 1, 1))
    held = made.reserve(0, 2, (1, 2, 0))
    assert made.capacity_tokens[0].tolist() == [4, 8, 0]
    assert made.block_table[0, 1, :2].tolist() == held.block[1]
    theirs = {page for pages in other.block for page in pages}
    assert theirs.isdisjoint(page for pages in held.block for page in pages)


def test_a_model_without_layers_of_its_own_at_the_ends_needs_no_blocks_there():
    made = allocator(end_pages=0, name="expert_cycle")
    held = made.reserve(0, 0, (2, 2, 2))
    assert held.ends == [] and made.used == (0, 6)


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_calls_loses_a_block_or_gives_it_twice(seed):
    made, rng, held, done = allocator(), np.random.default_rng(seed), {}, collections.Counter()
    for _ in range(300):
        slot = int(rng.integers(SLOTS))
        ends, block = made.used
        if slot not in held:
            wanted = int(rng.integers(1, 6)), tuple(rng.integers(0, 5, LISTS).tolist())
            taken = made.reserve(slot, *wanted)
            fits = wanted[0] <= 10 - ends and sum(wanted[1]) <= 14 - block
            assert (taken is not None) == fits
            done["reserved" if fits else "refused"] += 1
            if fits:
                held[slot] = taken
        elif rng.random() < 0.5 and len(held[slot].block[0]) < LENGTH // SIZE:
            assert made.extend(slot, held[slot], 0) == (block < 14)
            done["extended" if block < 14 else "full"] += 1
        else:
            made.release(held.pop(slot))
            done["released"] += 1
        at_ends = [page for one in held.values() for page in one.ends]
        in_block = [page for one in held.values() for pages in one.block for page in pages]
        assert len(set(at_ends)) == len(at_ends) and set(at_ends) <= set(range(10))
        assert len(set(in_block)) == len(in_block) and set(in_block) <= set(range(14))
        assert made.used == (len(at_ends), len(in_block))
    assert min(done[name] for name in ("reserved", "refused", "extended", "full", "released")) > 2
    for one in held.values():
        made.release(one)
    assert made.used == (0, 0)
