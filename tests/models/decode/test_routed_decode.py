"""Tokens on their way through recursions, row by row: who moves, who leaves, who is left alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY

from mor_jax.models.decode import routed_decode
from mor_jax.models.decode.batch import DecodeBatch
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import Weights
from mor_jax.models.decode.paged_cache import BlockTables, KVCacheSpec
from mor_jax.models.decode.routed_decode import KVEntry, TokenState
from mor_jax.models.params import forward
from mor_jax.models.routing.router import Route
from mor_jax.types import Batch

SIZE, LENGTH, ROWS = 2, 4, 3
BOOL = {"T": True, "F": False}


def flags(text):
    return jnp.asarray([BOOL[letter] for letter in text])


def numbers(*values):
    return jnp.asarray(values, jnp.int32)


def decoder(name, thresholds=(0.0, 0.0, 0.0)):
    """Every row has a slot and blocks of its own, enough for `LENGTH` tokens at any depth."""
    cfg, each = TINY[name], LENGTH // SIZE
    spec = KVCacheSpec(cfg, SIZE)
    ends = jnp.arange(ROWS * each, dtype=jnp.int32).reshape(ROWS, each)
    block = jnp.arange(ROWS * spec.lists * each, dtype=jnp.int32).reshape(ROWS, spec.lists, each)
    weights = Weights.of(cfg, random_params(cfg))
    made = Decoder(spec, weights, BlockTables(ends, block), jnp.asarray(thresholds), 4)
    return made, spec.cache(ends.size, block.size)


def rows(position=0, valid="TTT"):
    return DecodeBatch(numbers(0, 1, 2), jnp.full(ROWS, position, jnp.int32), flags(valid))


def test_shared_keys_are_computed_of_all_tokens_in_the_first_recursion():
    taken, recursion = flags("TFTF"), numbers(0, 0, 1, 1)
    own = routed_decode.needs_block(TINY["expert"], taken, recursion)
    assert own.tolist() == [True, False, True, False]
    for name in ("expert_kv", "expert_kv_update"):
        shared = routed_decode.needs_block(TINY[name], taken, recursion)
        assert shared.tolist() == [True, True, True, False], name


@pytest.mark.parametrize(
    ("name", "writes"),
    [("expert", "TFTF"), ("expert_kv_update", "TFTF"), ("expert_kv", "TFFF")],
)
def test_lists_are_written_by_those_that_run_where_they_have_one(name, writes):
    runs, recursion = flags("TFTF"), numbers(0, 0, 1, 2)
    found = routed_decode.writes_list(TINY[name], runs, recursion)
    np.testing.assert_array_equal(found, flags(writes))


def test_gating_decides_whether_the_score_weighs_the_output():
    gate, y = jnp.asarray([0.5, 2.0]), jnp.asarray([[1.0, 3.0], [5.0, 7.0]])
    weighted = routed_decode.weighted_output(TINY["expert"], gate, y)
    assert weighted.tolist() == [[0.5, 1.5], [10, 14]]
    np.testing.assert_array_equal(
        routed_decode.weighted_output(TINY["expert_additive"], gate, y), y
    )


@pytest.mark.parametrize(("name", "starts"), [("expert", False), ("token", True)])
def test_a_state_of_nowhere_is_all_zero(name, starts):
    state = TokenState.empty(TINY[name], 5)
    assert (state.origin is not None) == starts
    assert state.x.shape == (5, 32) and state.gate.shape == (5,)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))
    entry = KVEntry.empty(TINY[name], 5)
    assert entry.k.shape == entry.v.shape == (5, 2, 8) and not np.asarray(entry.k).any()


@pytest.mark.parametrize("name", ["expert", "token_kv"])
def test_rows_that_only_fill_the_shape_change_nothing(name):
    made, cache = decoder(name)

    def both(token):
        state, _ = routed_decode.enter(made, cache, rows(), token)
        one = routed_decode.advance(made, cache, rows(valid="TFF"), state, numbers(0, 0, 0))
        return state, one

    before, (after, leaves, written) = jax.jit(both)(numbers(5, 9, 13))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(new[1:], old[1:])
    assert int(after.recursion[0]) == 1 and not leaves[1:].any()
    # Blocks of the first row, of all lists, are those that may be written.
    first = set(np.asarray(made.tables.block[0]).ravel().tolist())
    for pages in written.block:
        assert set(np.flatnonzero(np.asarray(pages.v).any(axis=(1, 2, 3)))) <= first


@pytest.mark.parametrize(
    ("thresholds", "depth"),
    # The first recursion has capacity 1: all pass it, whatever their score.
    [((9e9, 9e9, 9e9), 1), ((0, -9e9, 9e9), 2), ((-9e9, -9e9, -9e9), 3)],
)
def test_thresholds_decide_after_which_recursion_a_token_leaves(thresholds, depth):
    made, cache = decoder("expert", tuple(map(float, thresholds)))
    step = jax.jit(
        lambda state: routed_decode.advance(made, cache, rows(), state, numbers(0, 0, 0))
    )
    state, _ = jax.jit(lambda t: routed_decode.enter(made, cache, rows(), t))(numbers(5, 9, 13))
    assert state.taken.all() and not state.depth.any()
    for number in range(1, depth + 1):
        x = state.x
        state, leaves, _ = step(state)
        assert state.recursion.tolist() == state.depth.tolist() == [number] * ROWS
        assert leaves.tolist() == (~state.taken).tolist() == [number == depth] * ROWS
        assert np.any(np.asarray(state.x != x), axis=1).all()


def generate(made, cache, ids):
    """Hidden states and depths of rows decoded token by token, every row to its end first."""
    cfg, spec = made.cfg, made.geometry

    @jax.jit
    def token(cache, counts, position, ids):
        here = rows(0)
        here = dataclasses.replace(here, position=jnp.full(ROWS, position))
        state, first = routed_decode.enter(made, cache, here, ids)
        cache = routed_decode.store(made, cache, here, first, 0)
        gone, final = jnp.zeros(ROWS, bool), jnp.zeros_like(state.x)
        for _ in range(cfg.num_recursions):
            moving = dataclasses.replace(here, valid=~gone)
            which = spec.list_of(jnp.minimum(state.recursion, cfg.num_recursions - 1))
            mine = jnp.take_along_axis(counts, which[:, None], axis=1)[:, 0]
            runs = moving.valid & routed_decode.needs_block(cfg, state.taken, state.recursion)
            adds = routed_decode.writes_list(cfg, runs, state.recursion)
            state, leaves, cache = routed_decode.advance(made, cache, moving, state, mine)
            counts += adds[:, None] & (jnp.arange(spec.lists)[None] == which[:, None])
            final = jnp.where(leaves[:, None], state.x, final)
            gone |= leaves
        hidden, last = routed_decode.leave(made, cache, here, final)
        return routed_decode.store(made, cache, here, last, 1), counts, hidden, state.depth, gone

    counts, found = jnp.zeros((ROWS, spec.lists), jnp.int32), []
    for position in range(LENGTH):
        cache, counts, *told, gone = token(cache, counts, numbers(position)[0], ids[:, position])
        assert gone.all()
        found.append(told)
    hidden, depth = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    return hidden, depth


@pytest.mark.parametrize("name", ["expert_kv_update", "token_kv"])
def test_token_by_token_gives_what_the_whole_row_gives(name):
    cfg = TINY[name]
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 64, (ROWS, LENGTH)), jnp.int32)
    hidden, depth = generate(*decoder(name), ids)
    route = Route(mode="causal", thresholds=(0.0,) * 3 if cfg.router.kind == "expert" else None)
    whole = jax.jit(lambda params: forward(cfg, params, Batch(ids, ids), route))(random_params(cfg))
    assert len(np.unique(depth)) > 1
    np.testing.assert_array_equal(depth, whole.routing.depth)
    np.testing.assert_allclose(hidden, whole.hidden, atol=2e-5)
