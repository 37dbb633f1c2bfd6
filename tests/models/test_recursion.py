"""The recursion stage around a block whose effect on every token is known.

The block adds 1 to channel 1 + r of the tokens that recursion r processes, so the output shows who
went where. Routers read one channel each: the scores are what the test put into the input.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import TINY

from mor_jax.models.attention import KeyValue, SequenceContext
from mor_jax.models.block import SavedOutputs, Stack
from mor_jax.models.layers.rope import compute_rotary_tables
from mor_jax.models.recursion import (
    ActiveTokens,
    RecursionContext,
    run_expert_choice,
    run_token_choice,
    run_unrouted,
)
from mor_jax.models.routing.router import Route, Routers

ROWS, LENGTH, DEPTH = 3, 8, 3
SCORES = slice(8, 8 + DEPTH)
"""Channels that the routers read."""

MARKS = slice(1, 1 + DEPTH)
"""Channels that the block writes."""


class MarkingBlock(Stack):
    """Stands for the shared block. calls: what each recursion was handed."""

    def __init__(self, residual):
        # A routed model adds the block's output itself; in the others it holds the input already.
        self.residual, self.calls = residual, nnx.data([])

    def __call__(self, x, context, *, recursion=0, shared_kv=None, sequence=None, save=()):
        call = {"tokens": x.shape[1], "context": context, "shared_kv": shared_kv, "save": save}
        self.calls.append(call)
        mark = jnp.zeros_like(x).at[..., 1 + recursion].set(x[..., 7])
        kv = KeyValue(x[None, :, :, None], x[None, :, :, None]) if "kv" in save else None
        return (x + mark if self.residual else mark), SavedOutputs(kv=kv)


def context(name, capacity=(0.75, 0.5, 0.25), route=None, **router):
    cfg = TINY[name]
    if cfg.router.kind == "expert":
        router = {"capacity": capacity, "gating": "additive"} | router
    cfg = dataclasses.replace(cfg, router=dataclasses.replace(cfg.router, **router))
    routers = Routers(cfg, rngs=nnx.Rngs(params=0)) if cfg.router.kind != "none" else None
    if routers is not None:
        routers.main.weight[...] = jnp.eye(cfg.hidden_size)[SCORES]
    block = MarkingBlock(residual=cfg.router.kind != "expert")
    return RecursionContext(cfg, block, routers, route or Route())


def run(stage, x, row):
    """The stage's output, its routing, and what its block was handed, from one compilation."""
    kind = stage.cfg.router.kind
    stages = {"expert": run_expert_choice, "token": run_token_choice, "none": run_unrouted}

    def traced(x, row):
        out, routing = stages[kind](stage, x, row)
        calls = stage.shared.calls
        return out, routing, [(call["context"].index, call["shared_kv"]) for call in calls]

    return jax.jit(traced)(x, row)


def inputs(seed=0, segments=None):
    """Random residual stream with 1 in channel 7 and 0 where the block writes; its row."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, LENGTH, 32)).astype(np.float32)
    x[..., MARKS], x[..., 7] = 0, 1
    positions = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, 1))
    tables = compute_rotary_tables(positions, 8, 1e4, TINY["plain"].rope_scaling)
    return jnp.asarray(x), SequenceContext(tables, segments)


def best(scores, active, count):
    """Of the active tokens of a row the `count` with the highest scores."""
    ranked = sorted(np.flatnonzero(active), key=lambda place: -scores[place])[:count]
    return np.isin(np.arange(len(scores)), ranked)


def nested_choice(x, counts, active=None):
    """[r, rows, length]: who is processed, where each recursion ranks those of the one before."""
    scores = np.asarray(x)[..., SCORES]
    active = np.ones((ROWS, LENGTH), bool) if active is None else active
    found = []
    for r, count in enumerate(counts):
        active = np.stack([best(scores[b, :, r], active[b], count) for b in range(ROWS)])
        found.append(active)
    return np.stack(found)


def processed(x, out):
    return np.moveaxis(np.asarray(out - x)[..., MARKS] != 0, -1, 0)


def test_expert_choice_processes_the_best_of_those_that_are_left():
    x, row = inputs()
    out, routing, _ = run(context("expert"), x, row)
    want = nested_choice(x, (6, 4, 2))
    np.testing.assert_array_equal(processed(x, out), want)
    np.testing.assert_array_equal(routing.depth, want.sum(axis=0))
    assert want.sum(axis=-1).tolist() == [[6] * ROWS, [4] * ROWS, [2] * ROWS]
    np.testing.assert_array_equal(routing.expert.chosen, [6 * ROWS, 4 * ROWS, 2 * ROWS])
    np.testing.assert_array_equal(routing.expert.candidates, [8 * ROWS, 6 * ROWS, 4 * ROWS])


def test_dropped_tokens_come_out_as_they_went_in():
    x, row = inputs()
    out, routing, _ = run(context("expert", gating="weighted"), x, row)
    depth = np.asarray(routing.depth)
    assert (depth == 0).sum() == 2 * ROWS
    np.testing.assert_array_equal(np.asarray(out)[depth == 0], np.asarray(x)[depth == 0])
    # Of the others the block changed its own channels and no other.
    others = np.delete(np.asarray(out - x), np.r_[MARKS], axis=-1)
    assert not others.any()


def test_weighted_gating_multiplies_the_output_by_the_score():
    x, row = inputs()
    out, *_ = run(context("expert", gating="weighted", alpha=0.3), x, row)
    score = 0.3 / (1 + np.exp(-np.asarray(x)[..., SCORES]))
    want = np.moveaxis(nested_choice(x, (6, 4, 2)), 0, -1) * score
    np.testing.assert_allclose(out[..., MARKS], want, rtol=1e-5)


@pytest.mark.parametrize("name", ["expert", "expert_kv"])
def test_padding_is_never_processed(name):
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[0, 5:] = segments[1, :3] = segments[2, 1:] = 0
    x, row = inputs(segments=jnp.asarray(segments))
    out, routing, _ = run(context(name), x, row)
    want = nested_choice(x, (6, 4, 2), segments > 0)
    np.testing.assert_array_equal(processed(x, out), want)
    np.testing.assert_array_equal(routing.depth, want.sum(axis=0))
    assert not np.asarray(routing.depth)[segments == 0].any()
    np.testing.assert_array_equal(routing.expert.chosen, [5 + 5 + 1, 4 + 4 + 1, 2 + 2 + 1])


def test_the_route_may_name_other_counts():
    x, row = inputs()
    out, *_ = run(context("expert", route=Route(capacity_tokens=(8, 3, 3))), x, row)
    np.testing.assert_array_equal(processed(x, out), nested_choice(x, (8, 3, 3)))


def test_causal_routing_asks_each_token_alone():
    x, row = inputs()
    route = Route(mode="causal", thresholds=(0.0, -0.2, 0.3))
    stage = context("expert", capacity=(1.0, 0.5, 0.25), route=route)
    assert stage.capacity_tokens(LENGTH) == (LENGTH,) * DEPTH
    out, routing, _ = run(stage, x, row)
    scores = np.moveaxis(np.asarray(x)[..., SCORES], -1, 0)
    # The first recursion has room for all and takes all.
    first = np.ones((ROWS, LENGTH), bool)
    second = scores[1] >= -0.2
    want = np.stack([first, second, second & (scores[2] >= 0.3)])
    assert 0 < want[2].sum() < want[1].sum() < want[0].sum()
    np.testing.assert_array_equal(processed(x, out), want)
    np.testing.assert_array_equal(routing.depth, want.sum(axis=0))


def test_gradients_reach_a_token_through_every_recursion_that_processed_it():
    x, row = inputs()
    stage = context("expert")
    grad = jax.grad(lambda x: jnp.sum(run(stage, x, row)[0]))(x)
    depth = nested_choice(x, (6, 4, 2)).sum(axis=0)
    # Each pass adds channel 7 once more; what was dropped has the residual stream's gradient alone.
    np.testing.assert_array_equal(grad[..., 7], 1 + depth)
    others = np.delete(np.asarray(grad), np.r_[MARKS, 7], axis=-1)
    np.testing.assert_array_equal(others, np.ones_like(others))


def test_recursions_with_keys_of_their_own_see_their_tokens_places():
    x, row = inputs()
    stage = context("expert")
    *_, handed = run(stage, x, row)
    want = nested_choice(x, (6, 4, 2))
    assert [call["tokens"] for call in stage.shared.calls] == [6, 4, 2]
    assert [call["save"] for call in stage.shared.calls] == [()] * DEPTH
    for (index, shared), chosen in zip(handed, want, strict=True):
        assert index.tolist() == [np.flatnonzero(one).tolist() for one in chosen]
        assert shared is None


def test_shared_keys_are_those_of_all_tokens_of_the_first_recursion():
    x, row = inputs()
    stage = context("expert_kv")
    out, _, handed = run(stage, x, row)
    first, *later = stage.shared.calls
    assert first["tokens"] == LENGTH and first["save"] == ("kv",)
    assert [call["tokens"] for call in later] == [4, 2]
    for _, shared in handed[1:]:
        np.testing.assert_array_equal(shared.k[0, :, :, 0], x)
    # Tokens that it does not choose are run for their keys alone.
    np.testing.assert_array_equal(processed(x, out), nested_choice(x, (6, 4, 2)))


def token_weights(x):
    """Softmax over depths, the choice and its weight."""
    scores = np.asarray(x, np.float64)[..., SCORES]
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    choice = weights.argmax(axis=-1)
    return choice, np.take_along_axis(weights, choice[..., None], axis=-1)


def check_token_output(x, out, passes, gate):
    """x + w * (x with a mark of every pass); x itself where there was none."""
    block = np.asarray(x, np.float64).copy()
    block[..., MARKS] = np.arange(DEPTH) < passes[..., None]
    want = np.where(passes[..., None] > 0, x + gate * block, x)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(out)[passes == 0], np.asarray(x)[passes == 0])


def test_token_choice_leaves_after_the_depth_that_it_picked():
    x, row = inputs()
    out, routing, _ = run(context("token"), x, row)
    choice, gate = token_weights(x)
    assert len(np.unique(choice)) == DEPTH
    check_token_output(x, out, choice + 1, gate)
    np.testing.assert_array_equal(routing.depth, choice + 1)
    np.testing.assert_array_equal(routing.token.overflow, [0, 0, 0])
    np.testing.assert_array_equal(routing.token.choice, np.bincount(choice.ravel(), minlength=3))


def test_token_choice_turns_the_lowest_weights_away_where_room_is_short():
    x, row = inputs()
    out, routing, _ = run(context("token", route=Route(capacity_tokens=(6, 3, 1))), x, row)
    choice, gate = token_weights(x)
    active, passes, lost = np.ones((ROWS, LENGTH), bool), np.zeros((ROWS, LENGTH), int), []
    for r, count in enumerate((6, 3, 1)):
        wanted = active & (choice >= r)
        active = np.stack([best(gate[b, :, 0], wanted[b], count) for b in range(ROWS)])
        passes += active
        lost.append((wanted & ~active).sum())
    assert min(lost) > 0 and (passes == 0).sum() == 2 * ROWS
    check_token_output(x, out, passes, gate)
    np.testing.assert_array_equal(routing.depth, passes)
    np.testing.assert_array_equal(routing.token.overflow, lost)


@pytest.mark.parametrize(("step", "warming"), [(4, True), (5, False), (None, False)])
def test_everybody_goes_all_the_way_while_balancing_warms_up(step, warming):
    x, row = inputs()
    _, routing, _ = run(context("token", route=Route(step=step), balance_warmup_steps=5), x, row)
    choice, _ = token_weights(x)
    np.testing.assert_array_equal(routing.depth, DEPTH if warming else choice + 1)


def test_the_balancing_bias_moves_the_choice_and_not_the_weight():
    x, row = inputs()
    stage = context("token_loss_free")
    stage.routers.bias[...] = jnp.asarray([0.0, 0.0, 2.0])
    out, routing, _ = run(stage, x, row)
    scores = np.exp(np.asarray(x, np.float64)[..., SCORES])
    gate = (scores / scores.sum(axis=-1, keepdims=True))[..., 2:]
    np.testing.assert_array_equal(routing.depth, DEPTH)
    check_token_output(x, out, np.full((ROWS, LENGTH), DEPTH), gate)


@pytest.mark.parametrize("name", ["middle_cycle", "middle_cycle_kv"])
def test_without_routers_every_token_passes_every_recursion(name):
    x, row = inputs()
    stage = context(name)
    out, layers, handed = run(stage, x, row)
    passes = stage.cfg.num_recursions
    want = np.arange(DEPTH) < passes
    np.testing.assert_array_equal(out[..., MARKS], np.broadcast_to(want, (ROWS, LENGTH, DEPTH)))
    assert layers == () and [call["tokens"] for call in stage.shared.calls] == [LENGTH] * passes
    first, *later = [shared for _, shared in handed]
    assert first is None and len(later) == passes - 1
    assert all((kv is not None) == stage.shares_kv for kv in later)


def test_levels_within_levels_know_their_places_in_the_row():
    whole = ActiveTokens()
    first = whole.select(jnp.asarray([[1, 3, 4], [0, 2, 5]], jnp.int32), None, 6)
    valid = jnp.asarray([[True, True], [True, False]])
    second = first.select(jnp.asarray([[0, 2], [1, 2]], jnp.int32), valid, 3)
    assert second.index.tolist() == [[1, 4], [2, 5]]
    row = jnp.arange(12.0).reshape(2, 6, 1)

    def there_and_back(row):
        inner = second.gather(first.gather(row))
        return inner, first.scatter(row, second.scatter(first.gather(row), inner + 100))

    inner, back = jax.jit(there_and_back)(row)
    assert inner[..., 0].tolist() == [[1, 4], [8, 11]]
    # A slot that only fills the shape is not put back.
    assert back[..., 0].tolist() == [[0, 101, 2, 3, 104, 5], [6, 7, 108, 9, 10, 11]]


def test_a_level_of_all_tokens_hands_them_through():
    first = ActiveTokens().select(jnp.asarray([[1, 3]], jnp.int32), None, 4)
    again = first.select_all()
    here = jnp.arange(2.0)[None, :, None]
    assert again.gather(here) is here and again.scatter(here + 1, here) is here
    assert again.index is first.index
