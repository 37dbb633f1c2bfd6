"""Who gets slots and blocks: in order, never more than there are, the youngest gives way."""

import collections

import numpy as np
import pytest
from support.tiny import TINY

from mor_jax.data.tokenizers.bytes import ByteTokenizer
from mor_jax.inference.config import CachePlan
from mor_jax.inference.detokenizer import TextStream
from mor_jax.inference.engine.request import Request
from mor_jax.inference.engine.scheduler import Scheduler
from mor_jax.inference.engine.sequence import Sequence
from mor_jax.inference.engine.statistics import Counters
from mor_jax.models.decode.paged_cache import KVCacheSpec

SIZE, LONGEST, LISTS = 4, 16, 3
SHARE = (1.0, 0.5, 0.25)
"""A sequence of 16 tokens reserves 4 blocks at the ends and (4, 2, 1) in the lists."""

ALL = 4 * LISTS
"""Blocks that one sequence of 16 tokens may need: what a cache holds at least."""


def scheduler(slots=4, end_pages=100, block_pages=100):
    spec = KVCacheSpec(TINY["expert"], SIZE)
    return Scheduler(CachePlan(spec, slots, end_pages, block_pages, LONGEST, SHARE), Counters())


def sequence(name, length=LONGEST):
    """One of `length` tokens in the end; its seed tells it from others."""
    request = Request(prompt=(1, 2), max_tokens=length - 2)
    return Sequence(request, lambda event: None, seed=name, text=TextStream(ByteTokenizer()))


def waiting(made, *lengths):
    """The sequences, put into the queue."""
    added = [sequence(name, length) for name, length in enumerate(lengths)]
    made.waiting.extend(added)
    return added


def running(made):
    return {one.seed for one in made.running.values()}


def test_slots_are_given_in_the_order_of_arrival_and_once_each():
    made = scheduler(slots=2)
    first, second, third = waiting(made, 16, 16, 16)
    made.admit()
    assert running(made) == {0, 1} and list(made.waiting) == [third]
    assert {first.slot, second.slot} == {0, 1} and third.slot is None
    assert first.admission_order < second.admission_order
    made.remove(second)
    assert second.slot is None
    made.admit()
    assert running(made) == {0, 2} and not made.waiting
    assert third.slot != first.slot and third.admission_order > first.admission_order


def test_a_reservation_is_the_expected_share_of_the_whole_length():
    made = scheduler()
    (one,) = waiting(made, 16)
    made.admit()
    assert made.pages.used == (4, 4 + 2 + 1)
    assert made.pages.capacity_tokens[one.slot].tolist() == [16, 8, 4]
    assert one.counts.tolist() == [0, 0, 0]


def test_nobody_overtakes_the_one_that_waits_for_blocks():
    # 7 of 12 blocks are taken. The next wants 7, the one behind it 3 (8 tokens: 2 and 1 and 1).
    made = scheduler(block_pages=ALL)
    first, long, short = waiting(made, 16, 16, 8)
    made.admit()
    assert running(made) == {0} and list(made.waiting) == [long, short]
    assert made.pages.used == (4, 7)
    made.remove(first)
    made.admit()
    # 7 and 4 of 12.
    assert running(made) == {1, 2}


def test_too_few_blocks_at_the_ends_make_one_wait_too():
    made = scheduler(end_pages=7)
    waiting(made, 16, 16)
    made.admit()
    assert running(made) == {0} and made.pages.used == (4, 7)


def test_the_time_of_the_first_slot_is_kept():
    made = scheduler()
    one, other = waiting(made, 16, 16)
    made.admit()
    placed = one.first_scheduled_time
    assert placed is not None and other.first_scheduled_time >= placed
    made.preempt(one)
    made.admit()
    assert one.first_scheduled_time == placed and one.slot is not None


def test_prompts_are_stored_oldest_first_and_the_rest_decodes():
    made = scheduler()
    first, second, third = waiting(made, 16, 16, 16)
    assert made.next_prefill() is None and made.decoding() == []
    made.admit()
    assert made.next_prefill() is first and made.decoding() == []
    first.decoding = third.decoding = True
    assert made.next_prefill() is second
    assert {one.seed for one in made.decoding()} == {0, 2}
    second.decoding = True
    assert made.next_prefill() is None


def test_one_that_gave_way_is_the_next_to_run_and_starts_again():
    made = scheduler(slots=2)
    first, second, third = waiting(made, 16, 16, 16)
    made.admit()
    second.prefilled, second.decoding = 2, True
    made.preempt(second)
    assert list(made.waiting) == [second, third] and running(made) == {0}
    assert (second.slot, second.prefilled, second.decoding, second.epoch) == (None, 0, False, 1)
    assert made.pages.used == (4, 7) and made.counters.preemptions == 1
    made.admit()
    assert running(made) == {0, 1} and list(made.waiting) == [third]
    assert made.unfinished() == [*made.running.values(), third] and first.slot is not None


def test_a_list_that_needs_more_takes_free_blocks_first():
    made = scheduler()
    first, second = waiting(made, 16, 16)
    made.admit()
    made.ensure_capacity(first, 2, 9)
    assert made.pages.capacity_tokens[first.slot].tolist() == [16, 8, 12]
    assert made.counters.overflows == 2 and made.counters.preemptions == 0
    assert made.pages.used == (8, 2 * 7 + 2) and running(made) == {0, 1}
    # What is there already costs nothing, and no list holds more than the sequence.
    made.ensure_capacity(first, 2, 12)
    assert made.counters.overflows == 2
    made.ensure_capacity(second, 1, 1000)
    assert made.pages.capacity_tokens[second.slot].tolist() == [16, 16, 4]


def test_the_youngest_gives_way_to_an_older_one():
    made = scheduler(slots=3, block_pages=21)
    first, second, third = waiting(made, 16, 16, 16)
    made.admit()
    assert made.pages.used[1] == 21
    made.ensure_capacity(first, 2, 5)
    assert running(made) == {0, 1} and list(made.waiting) == [third]
    assert made.pages.capacity_tokens[first.slot].tolist() == [16, 8, 8]
    assert made.counters.preemptions == 1 and second.slot is not None
    assert made.pages.used == (8, 7 + 8)


def test_the_youngest_itself_goes_back_to_the_queue():
    made = scheduler(slots=2, block_pages=14)
    first, second = waiting(made, 16, 16)
    made.admit()
    made.ensure_capacity(second, 1, 9)
    assert running(made) == {0} and list(made.waiting) == [second]
    assert second.slot is None and first.epoch == 0
    assert made.pages.used == (4, 7)


def test_what_a_list_turned_out_to_need_is_reserved_the_next_time():
    made = scheduler(slots=2, block_pages=14)
    first, second = waiting(made, 16, 16)
    made.admit()
    made.ensure_capacity(second, 2, 10)
    assert second.slot is None
    made.admit()
    # 4 + 2 + 3 blocks are not free while the first one holds 7 of 14.
    assert running(made) == {0}
    made.remove(first)
    made.admit()
    assert made.pages.capacity_tokens[second.slot].tolist() == [16, 8, 12]


def test_alone_a_sequence_can_go_as_deep_as_it_likes():
    made = scheduler(end_pages=4, block_pages=ALL)
    first, second = waiting(made, 16, 16)
    made.admit()
    for number in range(LISTS):
        made.ensure_capacity(first, number, 16)
    assert made.pages.capacity_tokens[first.slot].tolist() == [16] * LISTS
    assert made.pages.used == (4, ALL) and list(made.waiting) == [second]


@pytest.mark.parametrize(
    ("counts", "room"),
    [
        # Room for two more entries: one of the step under way, one of the next.
        ((0, 6, 2), (16, 8, 4)),
        ((0, 7, 2), (16, 12, 4)),
        ((0, 6, 3), (16, 8, 8)),
        # A list with room for every token never grows.
        ((16, 8, 4), (16, 12, 8)),
    ],
)
def test_lists_grow_before_they_are_full(counts, room):
    made = scheduler()
    one, prompt = waiting(made, 16, 16)
    made.admit()
    one.decoding = True
    one.counts[:] = prompt.counts[:] = counts
    made.grow()
    assert made.pages.capacity_tokens[one.slot].tolist() == list(room)
    # One whose prompt is still being stored gets room with each piece of it, not here.
    assert made.pages.capacity_tokens[prompt.slot].tolist() == [16, 8, 4]


def test_growing_stops_for_one_that_gives_way_meanwhile():
    made = scheduler(slots=2, block_pages=14)
    first, second = waiting(made, 16, 16)
    made.admit()
    first.decoding = second.decoding = True
    first.counts[:] = second.counts[:] = (8, 8, 4)
    made.grow()
    assert running(made) == {0} and list(made.waiting) == [second]
    assert made.pages.capacity_tokens[first.slot].tolist() == [16, 12, 8]
    assert made.counters.preemptions == 1


def test_one_that_has_ended_is_forgotten_wherever_it_is():
    made = scheduler(slots=1)
    first, second, third = waiting(made, 16, 16, 16)
    made.admit()
    made.remove(second)
    assert made.unfinished() == [first, third]
    made.remove(first)
    made.remove(first)
    assert made.unfinished() == [third] and made.pages.used == (0, 0)
    made.admit()
    assert running(made) == {2}
    made.remove(third)
    assert made.unfinished() == [] and made.pages.used == (0, 0)


def check_accounts(made):
    """Every slot and every block is free or held by exactly one sequence that runs."""
    held = [one.blocks for one in made.running.values()]
    ends = [page for one in held for page in one.ends]
    lists = [page for one in held for pages in one.block for page in pages]
    assert len(ends) == len(set(ends)) and len(lists) == len(set(lists))
    assert made.pages.used == (len(ends), len(lists))
    assert all(one.slot == slot for slot, one in made.running.items())
    assert all(one.slot is None and one.blocks is None for one in made.waiting)


@pytest.mark.parametrize("seed", range(5))
def test_all_end_and_nothing_leaks_whatever_depths_their_tokens_have(seed):
    made, rng = scheduler(slots=4, end_pages=12, block_pages=18), np.random.default_rng(seed)
    lengths = rng.integers(3, LONGEST + 1, 12).tolist()
    added = waiting(made, *lengths)
    ended, steps = collections.Counter(), 0
    while made.unfinished():
        steps += 1
        assert steps < 1000
        made.admit()
        # Nobody waits while nobody runs.
        assert made.running
        for one in made.running.values():
            one.decoding = True
        made.grow()
        check_accounts(made)
        for one in list(made.running.values()):
            one.prefilled += 1
            # A token is in list 0, and in every next one with a probability of its own.
            depth = 1 + int(rng.random() < 0.9) + int(rng.random() < 0.5)
            one.counts[:depth] += 1
            assert (one.counts <= made.pages.capacity_tokens[one.slot]).all()
            if one.prefilled == one.max_length:
                ended[one.seed] += 1
                made.remove(one)
        check_accounts(made)
    assert ended == collections.Counter(one.seed for one in added)
    assert made.pages.used == (0, 0)
    assert made.counters.preemptions > 0 and made.counters.overflows > 0
