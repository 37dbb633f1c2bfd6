"""What a budget of bytes buys: pages of both pools, and the context that is promised for them."""

import dataclasses

import pytest
from support.engines import served
from support.tiny import TINY

from mor_jax.inference.config import EngineConfig, plan_cache

FEW = EngineConfig(page=4)


@pytest.mark.parametrize("name", TINY)
def test_the_context_is_what_one_sequence_may_need_at_full_depth(name):
    model = served(name)
    whole = plan_cache(model, FEW)
    page = whole.deepest_bytes(4)
    for budget in (page, page + 1, 2 * page - 1, 3 * page, 16 * page, 100 * page):
        made = plan_cache(model, dataclasses.replace(FEW, cache_bytes=budget))
        assert made.max_length == min(64, budget // page * 4)
        ends, block = made.deepest_pages(made.max_length)
        assert ends <= made.end_pages and block <= made.block_pages
        assert made.cache_bytes <= budget
        # No page of either pool is left over.
        assert budget - made.cache_bytes < made.spec.end_page_bytes + made.spec.block_page_bytes


def test_without_a_budget_the_context_is_the_models():
    """Of a single sequence too, for which its expected depth would be the whole cache."""
    model = served("expert")
    for slots in (1, 2, 32, None):
        for page in (1, 3, 4, 64, 1000):
            made = plan_cache(model, EngineConfig(slots=slots, page=page))
            assert made.max_length == 64 and made.deepest_pages(64)[1] <= made.block_pages


def test_a_context_that_is_asked_for_and_not_held_is_refused():
    model = served("expert")
    cfg = dataclasses.replace(FEW, max_length=40)
    bytes_of = plan_cache(model, cfg).deepest_bytes
    enough = dataclasses.replace(cfg, cache_bytes=bytes_of(40))
    assert plan_cache(model, enough).max_length == 40
    few = dataclasses.replace(cfg, cache_bytes=bytes_of(40) - 1)
    message = (
        rf"max_length=40: the cache of .* holds 36 tokens .* a cache of {bytes_of(40):,} bytes"
    )
    with pytest.raises(ValueError, match=message):
        plan_cache(model, few)


def test_as_many_slots_as_are_asked_for_or_an_error():
    model = served("expert")
    assert plan_cache(model, EngineConfig(slots=300)).slots == 300
    cfg = EngineConfig(slots=10**12, cache_bytes=plan_cache(model, FEW).cache_bytes)
    with pytest.raises(
        ValueError, match=r"slots=1000000000000: so many slots need .* Use \d+ or less"
    ):
        plan_cache(model, cfg)
