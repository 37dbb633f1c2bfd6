"""The whole family against the plain oracle, and what routing promises: causality, padding."""

import dataclasses
from functools import cache, partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.seeded import random_params
from support.tiny import EXPERT, TINY, TOKEN, batch, tokens

from mor_jax.config import RouterConfig
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.types import Batch

LENGTH, SHORT, CUT = 16, 10, 9
ROUTED = EXPERT + TOKEN
CAUSAL, TOPK = Route(mode="causal"), Route()
# Settings that no variant of TINY has, several at a time: a compilation each is what tests cost.
MORE = {
    "expert_tight": dataclasses.replace(
        TINY["expert_mlp"],
        kv_mode="shared",
        share_norms=False,
        router=RouterConfig(
            kind="expert",
            activation="none",
            temperature=2.0,
            capacity=(0.75, 0.5),
            causal_routing="none",
        ),
    ),
    "token_tight": dataclasses.replace(
        TINY["token_mlp"],
        kv_mode="shared_update",
        share_norms=False,
        router=dataclasses.replace(
            TINY["token_mlp"].router, capacity_factor=0.8, gating="additive", temperature=0.5
        ),
    ),
}
ALL = TINY | MORE


def params_of(name):
    return random_params(ALL[name])


@cache
def runner(name, route):
    """One compiled forward pass for all tests of a variant and a route."""
    run = jax.jit(partial(forward, ALL[name], route=route))
    return lambda batch: run(params_of(name), batch)


def packed(seed=0):
    """Rows: one document; two documents; one of 10 tokens with padding right, then left."""
    ids = np.array(tokens(TINY["plain"], 4, LENGTH, seed))
    ids[3, -SHORT:] = ids[2, :SHORT]
    segments, positions = np.ones((4, LENGTH), int), np.tile(np.arange(LENGTH), (4, 1))
    segments[1, CUT:] = 2
    positions[1, CUT:] -= CUT
    segments[2, SHORT:] = segments[3, :-SHORT] = 0
    positions[3] = np.maximum(positions[3] - (LENGTH - SHORT), 0)
    arrays = (jnp.asarray(a, jnp.int32) for a in (ids, np.zeros_like(ids), segments, positions))
    return Batch(*arrays)


def assert_close(got, want, where, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got)[where], np.asarray(want)[where], atol=atol)


@pytest.mark.parametrize("name", TINY)
def test_causal_routing_equals_the_oracle(name):
    compare_with_oracle(name, CAUSAL)


@pytest.mark.parametrize("name", (*ROUTED, *MORE))
def test_topk_routing_equals_the_oracle(name):
    compare_with_oracle(name, TOPK)


def compare_with_oracle(name, route):
    cfg, rows = ALL[name], packed()
    got = runner(name, route)(rows)
    want = oracle.run(cfg, params_of(name), rows, route.mode)
    real = np.asarray(rows.segments) > 0
    assert_close(got.hidden, want.hidden, real)
    assert np.all(np.isfinite(got.hidden))
    if cfg.router.kind == "none":
        assert got.routing is None
        return
    np.testing.assert_array_equal(got.routing.depth, want.depth)
    # A test of routing where all tokens take one way would see little.
    assert len(np.unique(want.depth[real])) > 1
    assert not np.any(want.depth[~real])
    sums = got.routing.expert or got.routing.token
    for field, value in want.sums.items():
        np.testing.assert_allclose(getattr(sums, field), value, rtol=1e-5, atol=1e-5)


def changed(rows, row, position, by=7):
    """`rows` with another token at one place."""
    old = int(rows.tokens[row, position])
    tokens = rows.tokens.at[row, position].set((old + by) % 64)
    return dataclasses.replace(rows, tokens=tokens)


@pytest.mark.parametrize("name", TINY)
def test_a_token_changes_no_earlier_token_and_no_other_document(name):
    run, rows = runner(name, CAUSAL), packed()
    before = run(rows)
    for row, position, first, last in ((0, 8, 8, 16), (1, 3, 3, CUT), (1, 12, 12, 16)):
        after = run(changed(rows, row, position))
        moved = np.any(np.asarray(before.hidden != after.hidden), axis=-1)
        reached = np.zeros((4, LENGTH), bool)
        reached[row, first:last] = True
        assert not np.any(moved & ~reached)
        assert moved[row, position]
        if name in ROUTED:
            same = np.asarray(before.routing.depth == after.routing.depth)
            assert np.all(same | reached)


@pytest.mark.parametrize("name", EXPERT)
def test_topk_routing_lets_later_tokens_change_earlier_ones(name):
    run, rows = runner(name, TOPK), packed()
    before = run(rows).hidden
    after = [run(changed(rows, 0, 12 + i % 4, by=7 + i)).hidden for i in range(16)]
    assert any(np.any(np.asarray(before != a)[0, :12]) for a in after)


@pytest.mark.parametrize("name", TOKEN)
def test_token_choice_with_room_for_all_is_causal_as_trained(name):
    run, rows = runner(name, TOPK), packed()
    before, after = run(rows).hidden, run(changed(rows, 0, 8)).hidden
    assert not np.any(np.asarray(before != after)[0, :8])
    assert_close(before, runner(name, CAUSAL)(rows).hidden, np.asarray(rows.segments) > 0, 1e-6)


@pytest.mark.parametrize("name", TINY)
def test_padding_on_either_side_changes_nothing(name):
    rows = packed()
    got = runner(name, CAUSAL)(rows)
    right, left = got.hidden[2, :SHORT], got.hidden[3, -SHORT:]
    np.testing.assert_allclose(right, left, atol=1e-6)
    alone = Batch(rows.tokens[2:3, :SHORT], rows.targets[2:3, :SHORT])
    want = oracle.run(TINY[name], params_of(name), alone, "causal")
    np.testing.assert_allclose(right, want.hidden[0], atol=2e-5)
    if name in ROUTED:
        np.testing.assert_array_equal(got.routing.depth[2, :SHORT], want.depth[0])
        np.testing.assert_array_equal(got.routing.depth[3, -SHORT:], want.depth[0])


@pytest.mark.parametrize("name", ["expert", "expert_kv_update"])
def test_topk_with_the_capacities_of_a_short_row_ignores_padding(name):
    rows, kept = packed(), capacity_tokens(TINY[name], SHORT)
    got = runner(name, Route(capacity_tokens=kept))(rows)
    alone = Batch(rows.tokens[2:3, :SHORT], rows.targets[2:3, :SHORT])
    want = oracle.run(TINY[name], params_of(name), alone, "topk", kept)
    for real in (np.s_[2, :SHORT], np.s_[3, -SHORT:]):
        np.testing.assert_allclose(got.hidden[real], want.hidden[0], atol=2e-5)
        np.testing.assert_array_equal(got.routing.depth[real], want.depth[0])


def traced(cfg, params, route=TOPK):
    run = jax.jit(partial(forward, cfg, route=route, trace=True))
    return run(params, batch(cfg, 2, LENGTH))


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle"])
def test_one_recursion_equals_the_plain_model(sharing):
    cfg = dataclasses.replace(TINY["plain"], sharing=sharing)
    plain = random_params(TINY["plain"])
    params = {name: plain[name] for name in ("embed", "norm")}
    parts = {"first": np.s_[:1], "shared": np.s_[1:3], "last": np.s_[3:]}
    parts = parts if cfg.is_middle else {"shared": np.s_[:]}
    params |= {n: jax.tree.map(itemgetter(cut), plain["layers"]) for n, cut in parts.items()}
    got, want = traced(cfg, params), traced(TINY["plain"], plain)
    np.testing.assert_allclose(got.hidden, want.hidden, atol=1e-6)
    assert len(got.trace.layers) == len(want.trace.layers) == 4
    for one, other in zip(got.trace.layers, want.trace.layers, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("mode", ["topk", "causal"])
def test_choosing_everybody_adds_one_residual_to_the_recursive_model(mode):
    router = dataclasses.replace(TINY["expert_additive"].router, capacity=(1.0, 1.0))
    cfg = dataclasses.replace(TINY["expert_additive"], router=router)
    params = random_params(cfg)
    out = traced(cfg, params, Route(mode=mode))
    assert np.all(out.routing.depth == 2)
    before = out.trace.layers[0]
    for after in out.trace.layers[1:3]:
        block, _ = oracle.block(cfg, params, np.asarray(before, np.float64))
        np.testing.assert_allclose(after, before + block, atol=2e-5)
        before = after


@pytest.mark.parametrize("name", ["token", "token_kv"])
def test_everybody_at_the_last_depth_equals_the_recursive_model(name):
    router = dataclasses.replace(TINY[name].router, balance_warmup_steps=5)
    cfg = dataclasses.replace(TINY[name], router=router)
    params = random_params(cfg)
    out = traced(cfg, params, Route(step=4))
    assert np.all(out.routing.depth == 3)
    plain = dataclasses.replace(cfg, router=RouterConfig())
    want = traced(plain, {name: value for name, value in params.items() if name != "router"})
    weight = jax.nn.softmax(out.routing.recursion_traces[0].logits, axis=-1)[..., -1:]
    stage_in, stage_out = out.trace.layers[:2]
    np.testing.assert_allclose(stage_out, stage_in + weight * want.trace.layers[6], atol=1e-5)
    np.testing.assert_array_equal(out.routing.token.choice, [0, 0, 2 * LENGTH])


@pytest.mark.parametrize("name", ["expert_kv", "token"])
def test_bfloat16_computes_routing_in_float32(name):
    cfg = dataclasses.replace(TINY[name], dtype="bfloat16")
    params = random_params(cfg)
    out = traced(cfg, params)
    assert out.hidden.dtype == out.trace.layers[-1].dtype == jnp.bfloat16
    assert {v.logits.dtype for v in out.routing.recursion_traces} == {jnp.dtype("float32")}
    # Routers read the bfloat16 stream without losing more of it.
    stream = np.asarray(out.trace.layers[0], np.float64)
    weight = np.asarray(params["router"]["main"]["weight"], np.float64)
    want = stream @ weight[0] if name == "expert_kv" else stream @ weight.T
    np.testing.assert_allclose(out.routing.recursion_traces[0].logits, want, atol=1e-5)
    logits = jax.eval_shape(partial(unembed, cfg), params, out.hidden)
    assert logits.dtype == jnp.float32


def test_rows_longer_than_the_maximum_are_refused():
    cfg = dataclasses.replace(TINY["plain"], max_seq_len=8)
    rows, params = batch(cfg, 1, 9), random_params(cfg)
    with pytest.raises(ValueError, match=r"length=9: sequences have at most model\.max_seq_len=8"):
        jax.eval_shape(partial(forward, cfg), params, rows)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (Route(capacity_tokens=(16, 8)), r"route\.capacity_tokens=\(16, 8\): .* 3 recursions"),
        (Route(capacity_tokens=(8, 8, 9)), r"capacity_tokens=9: must be between 1 and 8"),
        (Route(mode="causal", thresholds=(0.0,)), r"route\.thresholds.* 3 recursions"),
    ],
)
def test_routes_that_do_not_fit_are_refused(route, message):
    cfg = TINY["expert"]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(forward, cfg, route=route), random_params(cfg), batch(cfg))


def test_thresholds_decide_who_goes_on():
    cfg, rows, params = TINY["expert"], packed(), params_of("expert")
    run = jax.jit(lambda t: forward(cfg, params, rows, Route(mode="causal", thresholds=t)))
    real = np.asarray(rows.segments) > 0
    everybody, nobody = run(jnp.full(3, -1e9)), run(jnp.full(3, 1e9))
    np.testing.assert_array_equal(everybody.routing.depth, 3 * real)
    # The first recursion has capacity 1: it takes every token, whatever its router says.
    np.testing.assert_array_equal(nobody.routing.depth, real)
