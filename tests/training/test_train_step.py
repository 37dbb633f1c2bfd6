"""One optimiser step: micro-batches, recomputation, skipped steps, balancing, seeded losses."""

import dataclasses
import itertools
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY, tokens, train_config

from mor_jax.models.params import forward, paths
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.training.losses import batch_counts, router_losses
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.train_state import new_state
from mor_jax.training.train_step import StepSpec, _balanced, train_step
from mor_jax.types import IGNORE, Batch

ROUTED = ("expert", "expert_aux_router", "token", "token_loss_free")
LENGTH = 16


def model(name, **changes):
    """`TINY[name]` with one shared layer and two recursions, which compiles in half the time."""
    cfg = dataclasses.replace(TINY[name], num_layers=2)
    if cfg.router.kind != "none":
        warm = dataclasses.replace(cfg.router, z_loss_coeff=0.01, balance_warmup_steps=2)
        cfg = dataclasses.replace(cfg, sharing="cycle", num_recursions=2, router=warm)
    return dataclasses.replace(cfg, **changes)


def config(name, accumulate=1, **changes):
    return train_config(
        model=model(name, **changes), grad_accum_steps=accumulate, z_loss_coeff=0.01
    )


@cache
def compiled(cfg):
    optimizer = make_optimizer(cfg.optim, cfg.steps, random_params(cfg.model))
    return jax.jit(partial(train_step, StepSpec(cfg, optimizer)))


def start(cfg):
    params = random_params(cfg.model)
    return new_state(params, make_optimizer(cfg.optim, cfg.steps, params).init(params))


def rows(seed):
    """Four rows, which differ in padding, documents and the number of targets."""
    ids = np.array(tokens(TINY["plain"], 4, LENGTH, seed))
    targets = np.roll(ids, -1, axis=1)
    segments = np.ones_like(ids)
    segments[1, 9:] = 2
    segments[2, 5:] = segments[3, :3] = 0
    targets[:, -1] = targets[segments == 0] = targets[0, 4:] = IGNORE
    positions = np.tile(np.arange(LENGTH), (4, 1))
    return Batch(*(jnp.asarray(a, jnp.int32) for a in (ids, targets, segments, positions)))


@cache
def three_steps(cfg):
    """States and metrics of three steps; learning rates are 0, half, full."""
    state, history = start(cfg), []
    for seed in range(3):
        state, metrics = compiled(cfg)(state, rows(seed))
        history.append((state, metrics))
    return history


def assert_same_run(one, other, rtol=1e-5, atol=1e-5):
    for (state, metrics), (same, alike) in zip(one, other, strict=True):
        assert metrics.keys() == alike.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, alike[name], rtol, atol, err_msg=name)
        # The first moment is the gradient; Adam's quotient would blow up what rounds to zero.
        for name in ("mu", "count"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-4, atol),
                state.opt_state[name],
                same.opt_state[name],
            )


@pytest.mark.parametrize("name", ("plain", *ROUTED))
def test_three_seeded_steps(name, golden, request):
    history = three_steps(config(name))
    names = ("loss", "ce", "grad_norm", "lr")
    found = {key: [float(metrics[key]) for _, metrics in history] for key in names}
    if request.config.getoption("--update-goldens"):
        golden(f"steps/{name}.json", found)
    want = json.loads((Path(__file__).parents[1] / f"goldens/steps/{name}.json").read_text())
    assert found.keys() == want.keys()
    for key, values in found.items():
        np.testing.assert_allclose(values, want[key], rtol=1e-4, err_msg=key)
    # The first update has learning rate 0, the last one moves every parameter but the bias.
    params = [start(config(name)).params] + [state.params for state, _ in history]
    moved = [jax.tree.leaves(jax.tree.map(jnp.array_equal, params[0], p)) for p in params[1:]]
    kinds = [path == "router.bias" for path in paths(params[0])]
    assert all(same or bias for same, bias in zip(moved[0], kinds, strict=True))
    assert not any(moved[2])


@pytest.mark.parametrize("name", ROUTED)
def test_micro_batches_change_nothing(name):
    assert_same_run(three_steps(config(name, accumulate=4)), three_steps(config(name)))


@pytest.mark.parametrize("remat", ["block", "full"])
def test_recomputing_activations_changes_nothing(remat):
    assert_same_run(three_steps(config("expert", remat=remat)), three_steps(config("expert")))


def test_recomputing_activations_keeps_less_for_the_backward_pass():
    def kept(remat):
        cfg = dataclasses.replace(TINY["expert_cycle"], num_layers=6, num_recursions=2, remat=remat)
        batch = rows(0)

        def run(params):
            return forward(cfg, params, batch).hidden

        pull = jax.eval_shape(lambda params: jax.vjp(run, params)[1], random_params(cfg))
        return sum(x.size for x in jax.tree.leaves(pull))

    none, block, full = (kept(remat) for remat in ("none", "block", "full"))
    assert full < block < none


def test_a_step_without_finite_loss_changes_nothing_but_the_counters():
    cfg = config("token_loss_free")
    good = three_steps(cfg)[1][0]
    poisoned = jax.tree.map(jnp.copy, good.params)
    poisoned["norm"]["scale"] = poisoned["norm"]["scale"].at[0].set(jnp.nan)
    before = dataclasses.replace(good, params=poisoned)
    state = before
    for count in (1, 2):
        state, metrics = compiled(cfg)(state, rows(2))
        assert not np.isfinite(metrics["loss"])
        assert int(state.skipped) == int(state.skipped_in_a_row) == count
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == count
    assert int(state.step) == int(before.step) + 2
    for tree in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, tree), getattr(before, tree))
    # A good step afterwards ends the row, and uses the learning rate that the bad ones left.
    state, metrics = compiled(cfg)(dataclasses.replace(state, params=good.params), rows(2))
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 0)
    assert np.isclose(metrics["lr"], three_steps(cfg)[2][1]["lr"])


def test_loss_free_balancing_moves_the_bias_by_its_rate_towards_rare_depths():
    cfg = config("token_loss_free")
    history = three_steps(cfg)
    first, rate = history[0], cfg.model.router.bias_update_rate
    # In balancing warm-up (2 steps, counted from 1) everybody goes to the end, the bias is zero.
    assert first[1]["choice_share"].tolist() == [0.0, 1.0]
    assert first[0].params["router"]["bias"].tolist() == [0.0, 0.0]
    for (before, _), (after, metrics) in itertools.pairwise(history):
        share = np.asarray(metrics["choice_share"])
        want = before.params["router"]["bias"] + rate * np.sign(share.mean() - share)
        np.testing.assert_array_equal(after.params["router"]["bias"], want.astype(np.float32))
        assert 0 < share[0] < 1
    for state, _ in history:
        assert not np.any(state.opt_state["mu"]["router"]["bias"])


@pytest.mark.parametrize("count", [[24, 24, 24], [23, 25, 24], [0, 36, 36], [1, 1, 16777210]])
def test_an_even_use_of_the_depths_moves_no_bias(count):
    cfg = dataclasses.replace(config("token_loss_free"), model=TINY["token_loss_free"])
    rate = cfg.model.router.bias_update_rate
    params = {"router": {"bias": jnp.zeros(3)}}
    ready, ok = jnp.asarray(99), jnp.asarray(True)
    # Compiled, a division of such counts would round, and an even use have a sign.
    move = jax.jit(lambda choice: _balanced(cfg, params, choice, ready, ok)["router"]["bias"])
    even = np.sum(count, dtype=np.int64) - 3 * np.asarray(count, np.int64)
    np.testing.assert_allclose(move(jnp.asarray(count, jnp.float32)), rate * np.sign(even))


def test_the_auxiliary_router_is_trained_alone():
    touched = {}
    for aux in ("aux_loss", "aux_router"):
        router = dataclasses.replace(TINY["expert"].router, causal_routing=aux)
        cfg = model("expert_aux_router", router=router)
        batch, kept = rows(0), capacity_tokens(cfg, LENGTH)

        def loss(params, cfg=cfg, batch=batch, kept=kept):
            routing = forward(cfg, params, batch, Route(capacity_tokens=kept)).routing
            return router_losses(cfg, routing, batch_counts(cfg, batch, kept))[0]

        grads = jax.jit(jax.grad(loss))(random_params(cfg))
        values = zip(paths(grads), jax.tree.leaves(grads), strict=True)
        touched[aux] = {path for path, grad in values if np.any(grad)}
    assert touched["aux_router"] == {"router.aux.weight"}
    # Without an auxiliary router the loss reaches the backbone before the last router.
    assert {"router.main.weight", "embed.weight", "shared.mlp.down"} <= touched["aux_loss"]


def test_reported_terms_add_up_and_shares_are_shares():
    for name in ROUTED:
        cfg = config(name)
        router = cfg.model.router
        for _, m in three_steps(cfg):
            bce = {"aux_loss": router.aux_loss_coeff, "aux_router": 1.0}.get(
                router.causal_routing, 0.0
            )
            balance = router.balance_loss_coeff * (router.load_balancing == "loss")
            total = m["ce"] + 0.01 * m["logit_z"] + 0.01 * m["router_z"]
            total += bce * m.get("router_bce", 0.0) + balance * m.get("router_balance", 0.0)
            np.testing.assert_allclose(m["loss"], total, rtol=1e-5)
            assert 0 < np.sum(m["depth_share"]) <= 1 + 1e-6
            if router.kind == "token":
                np.testing.assert_allclose(m["depth_share"], m["choice_share"], atol=1e-6)
                assert m["overflow_share"] == 0


def test_bfloat16_trains_float32_parameters():
    cfg = config("expert", dtype="bfloat16")
    state, metrics = jax.eval_shape(compiled(cfg), start(cfg), rows(0))
    floats = [x for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert jax.tree.structure(state) == jax.tree.structure(start(cfg))
