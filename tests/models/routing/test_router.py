"""Capacities and their warm-up, the choice of tokens, room in token-choice."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import EXPERT_ROUTER, TINY, TOKEN_ROUTER, batch

from mor_jax.config import RouterConfig
from mor_jax.convert.parity.reference_loss import FAST_COMPILATION
from mor_jax.models.params import forward
from mor_jax.models.routing.router import (
    Route,
    capacity_tokens,
    expert_score,
    kernel_multiple,
    select,
    token_score,
)
from mor_jax.types import Batch


def with_router(name, **changes):
    router = dataclasses.replace(TINY[name].router, **changes)
    return dataclasses.replace(TINY[name], router=router)


def test_counts_of_the_paper():
    # Paper section 3: rows of 2,048 tokens, three recursions.
    assert capacity_tokens(TINY["expert"], 2048) == (2048, 1365, 682)
    assert capacity_tokens(with_router("expert", capacity=(0.5, 0.3, 0.01)), 10) == (5, 3, 1)
    assert capacity_tokens(TINY["middle_cycle"], 10) == (10, 10)
    assert capacity_tokens(TINY["token"], 10) == (10, 10, 10)


@pytest.mark.parametrize("levels", [1, 3, 8, 1000])
def test_warm_up_goes_down_in_few_stairs_and_arrives(levels):
    cfg = with_router("expert", capacity_warmup_steps=50, capacity_warmup_stages=levels)
    counts = [capacity_tokens(cfg, 2048, step) for step in range(1, 71)]
    assert min(counts[0]) >= 2040
    final = capacity_tokens(cfg, 2048)
    assert counts[49:] == [final] * 21
    assert counts[48] != final
    for before, after in itertools.pairwise(counts):
        assert all(a >= b for a, b in zip(before, after, strict=True))
    assert len(set(counts)) <= levels + 1
    assert len(set(counts)) >= min(levels, 20)
    for kept in counts:
        assert sorted(kept, reverse=True) == list(kept)


def test_warm_up_follows_half_a_cosine():
    cfg = with_router("expert", capacity_warmup_steps=64, capacity_warmup_stages=64)
    for step in range(65):
        left = 0.5 * (1 + np.cos(np.pi * step / 64))
        shares = [c + (1 - c) * left for c in (1.0, 2 / 3, 1 / 3)]
        np.testing.assert_allclose(
            capacity_tokens(cfg, 10**6, step), 1e6 * np.array(shares), atol=1.01
        )


def test_room_of_token_choice():
    assert capacity_tokens(with_router("token", capacity_factor=1.0), 30) == (30, 20, 10)
    assert capacity_tokens(with_router("token", capacity_factor=1.5), 30) == (30, 30, 15)
    assert capacity_tokens(with_router("token", capacity_factor=0.1), 30) == (3, 2, 1)
    # 0.1 * 3 is a little more than 0.3, which is no reason for one more token.
    assert capacity_tokens(with_router("token", capacity_factor=0.3), 10)[0] == 3


def test_counts_are_rounded_up_to_the_multiple():
    cfg = with_router("expert", capacity_multiple=128)
    assert capacity_tokens(cfg, 2048) == (2048, 1408, 768)
    assert capacity_tokens(cfg, 1000) == (1000, 768, 384)
    assert capacity_tokens(cfg, 100) == (100, 100, 100)
    assert capacity_tokens(with_router("expert", capacity_multiple=1), 2048) == (2048, 1365, 682)
    roomy = with_router("token", capacity_factor=0.8, capacity_multiple=16)
    assert capacity_tokens(roomy, 100) == (80, 64, 32)
    assert capacity_tokens(with_router("token", capacity_multiple=16), 100) == (100, 100, 100)


def test_rounded_counts_fall_through_the_warm_up_in_no_more_stairs():
    cfg = with_router("expert", capacity_warmup_steps=50, capacity_multiple=128)
    counts = [capacity_tokens(cfg, 2048, step) for step in range(1, 71)]
    assert counts[0] == (2048, 2048, 2048) and counts[-1] == (2048, 1408, 768)
    for before, after in itertools.pairwise(counts):
        assert all(a >= b for a, b in zip(before, after, strict=True))
    assert all(count % 128 == 0 for kept in counts for count in kept)
    assert len(set(counts)) <= 9


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_a_device_wants_tiles_that_short_rows_can_afford(platform):
    found = {n: kernel_multiple(platform, n) for n in (2, 16, 31, 256, 1000, 2047, 2048, 32768)}
    assert list(found.values()) == [1, 1, 1, 16, 32, 64, 128, 128]
    assert kernel_multiple("cpu", 2048) == 1


SCORES = jnp.asarray([[0.3, 0.9, -0.5, 0.7, 0.1], [5.0, 4.0, 3.0, 2.0, 1.0]])


def test_the_best_are_chosen_in_the_order_of_the_row():
    index, valid = select(SCORES, 3, None, padding_last=True)
    assert index.tolist() == [[0, 1, 3], [0, 1, 2]]
    assert valid is None


@pytest.mark.parametrize("padding_last", [True, False])
def test_padding_fills_the_slots_that_no_eligible_token_takes(padding_last):
    eligible = jnp.asarray([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    index, valid = select(SCORES, 3, eligible, padding_last)
    assert index[1].tolist() == [0, 1, 2]
    assert valid[1].all()
    assert set(index[0][valid[0]].tolist()) == {2, 3}
    assert len(set(index[0].tolist())) == 3
    if padding_last:
        assert valid[0].tolist() == [True, True, False]
    else:
        assert index[0].tolist() == sorted(index[0].tolist())
    nobody, chosen = select(SCORES, 2, jnp.zeros((2, 5), bool), padding_last)
    assert not chosen.any()
    assert all(len(set(row)) == 2 for row in nobody.tolist())


def test_of_tied_scores_the_earlier_positions_are_chosen():
    # One and three units in the last place of 0.5; the last two of the row differ for certain.
    unit = 2.0**-24
    row = [0.25, 0.5 - 3 * unit, 0.5, 0.5 + unit, 0.5 - 1e-3, 0.5 + 1e-3]
    scores = jnp.asarray([row, row[::-1], [0.5] * 6])
    picked = {n: select(scores, n, None, padding_last=True)[0].tolist() for n in (1, 2, 3, 4)}
    assert picked == {
        1: [[5], [0], [0]],
        2: [[1, 5], [0, 2], [0, 1]],
        3: [[1, 2, 5], [0, 2, 3], [0, 1, 2]],
        4: [[1, 2, 3, 5], [0, 2, 3, 4], [0, 1, 2, 3]],
    }


def test_scores_that_are_no_numbers_are_chosen_last():
    nan, inf = float("nan"), float("inf")
    scores = jnp.asarray([[nan, 1.0, 2.0, nan], [inf, 1.0, inf, -inf], [nan] * 4])
    index, _ = select(scores, 2, None, padding_last=True)
    assert index.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_two_equal_tokens_are_ranked_by_position_however_they_are_compiled():
    # Tokens 0 and 1 see the same, so only rounding tells their scores apart: under these
    # options the compiler rounds a later one up, where a sort of the scores alone would follow.
    cfg, ids = TINY["expert"], np.random.default_rng(0).integers(0, 64, (64, 8)).astype(np.int32)
    ids[:, 1] = ids[:, 0]
    rows = Batch(jnp.asarray(ids), jnp.asarray(ids))
    run = jax.jit(lambda p: forward(cfg, p, rows).routing, compiler_options=FAST_COMPILATION)
    visits = run(random_params(cfg)).recursion_traces
    gap = np.asarray(visits[1].logits[:, 1] - visits[1].logits[:, 0])
    assert 0 < np.max(gap) < 1e-6
    split = 0
    for visit in visits[1:]:
        first, second = (np.any(np.asarray(visit.index) == place, axis=1) for place in (0, 1))
        assert not np.any(second & ~first)
        split += np.sum(first & ~second)
    assert split > 5


def test_no_more_can_be_chosen_than_there_are():
    with pytest.raises(ValueError, match=r"capacity_tokens=6: .* between 1 and 5"):
        select(SCORES, 6, None, padding_last=True)


def test_scores():
    z = jnp.asarray([[-2.0, 0.0, 3.0]])
    sigmoid = 1 / (1 + np.exp(-np.asarray(z)))
    tanh = dataclasses.replace(EXPERT_ROUTER, activation="tanh")
    raw = dataclasses.replace(EXPERT_ROUTER, activation="none")
    np.testing.assert_allclose(expert_score(EXPERT_ROUTER, z), 0.1 * sigmoid, rtol=1e-5)
    np.testing.assert_allclose(expert_score(tanh, z), 0.1 * np.tanh(z), rtol=1e-5)
    np.testing.assert_array_equal(expert_score(raw, z), z)
    half = dataclasses.replace(TOKEN_ROUTER, alpha=0.5)
    np.testing.assert_allclose(token_score(half, z[None]).sum(-1), 0.5, rtol=1e-6)
    free = RouterConfig(kind="token", activation="sigmoid", alpha=0.2)
    np.testing.assert_allclose(token_score(free, z[None]), 0.2 * sigmoid[None], rtol=1e-5)


def test_tokens_without_room_leave_one_recursion_earlier_lowest_score_first():
    # A room of 1.2 * 16 * (1, 2/3, 1/3) tokens, and a bias that sends everybody to the end.
    cfg = with_router("token_loss_free", capacity_factor=1.2)
    params = random_params(cfg)
    bias = jnp.asarray([0.0, 0.0, 10.0])
    params = params | {"router": params["router"] | {"bias": bias}}
    rows = batch(cfg, 3, 16)
    routing = jax.jit(lambda p: forward(cfg, p, rows, Route()))(params).routing
    assert capacity_tokens(cfg, 16) == (16, 13, 7)
    np.testing.assert_array_equal(routing.token.overflow, [0, 3 * 3, 3 * 6])
    np.testing.assert_array_equal(routing.token.choice, [0, 0, 3 * 16])
    weight = jax.nn.softmax(routing.recursion_traces[0].logits, axis=-1)[..., 2]
    rank = np.argsort(np.argsort(-np.asarray(weight), axis=1), axis=1)
    np.testing.assert_array_equal(routing.depth, np.where(rank < 7, 3, np.where(rank < 13, 2, 1)))
