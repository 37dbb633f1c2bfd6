"""Optimiser: schedules, AdamW against a plain numpy one, decay, clipping groups, the guard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.config import OptimConfig
from mor_jax.training import optimizer

CFG = OptimConfig(lr=0.01, warmup_steps=2, decay_steps=2, clip_norm=1.0)
STEPS = 5


@pytest.fixture
def params():
    """A small tree with a leaf of each kind: embedding, norm, stack, both routers, bias."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed.weight": (7, 4),
        "norm.scale": (4,),
        "shared.mlp.up": (2, 4, 6),
        "shared.norm1.scale": (2, 4),
        "router.main.weight": (3, 4),
        "router.aux.weight": (3, 4),
        "router.bias": (3,),
    }
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return nest(flat)


def nest(flat):
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def flatten(tree):
    return dict(zip(optimizer.paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def random_like(params, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (size * rng.normal(size=p.shape)).astype(p.dtype), params)


def stepper(tx):
    """One jitted update: (parameters, state, gradients, ok) -> (parameters, state)."""

    @jax.jit
    def step(params, state, grads, ok=True):
        updates, state = tx.update(grads, state, params, ok=ok)
        return optax.apply_updates(params, updates), state

    return step


def run(cfg, params, grads):
    """Applies one update per tree of gradients; returns the parameters and the state."""
    tx = optimizer.make_optimizer(cfg, STEPS, params)
    step, state = stepper(tx), tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def rates(cfg, steps, indices):
    return jax.jit(jax.vmap(optimizer.schedule(cfg, steps)))(jnp.asarray(indices))


def numpy_adamw(cfg, flat, grads, rates, decay, members):
    """AdamW as in Loshchilov and Hutter (2019), algorithm 2, with clipping by the global norm."""
    flat = {path: flat[path].astype(np.float64) for path in members}
    m = {path: 0.0 for path in members}
    v = {path: 0.0 for path in members}
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        g = flatten(g)
        norm = np.sqrt(sum(np.sum(g[path].astype(np.float64) ** 2) for path in members))
        for path in members:
            clipped = g[path] * min(1.0, cfg.clip_norm / norm)
            m[path] = cfg.b1 * m[path] + (1 - cfg.b1) * clipped
            v[path] = cfg.b2 * v[path] + (1 - cfg.b2) * clipped**2
            mean, square = m[path] / (1 - cfg.b1**t), v[path] / (1 - cfg.b2**t)
            shrink = cfg.weight_decay * flat[path] if path in decay else 0.0
            flat[path] = flat[path] - lr * (mean / (np.sqrt(square) + cfg.eps) + shrink)
    return flat


def test_schedule_is_the_recorded_one_of_the_reference():
    # Warm-up 2, decay 2 and 5 steps at 0.01, as the reference's trainer logged it.
    want = [0.0, 0.005, 0.01, 0.01, 0.005]
    np.testing.assert_allclose(rates(CFG, STEPS, range(STEPS)), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("trapezoid", [0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        ("constant", [0, 0.5] + [1] * 8),
        ("cosine", [0, 0.5, *(0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(8) / 8)))]),
    ],
)
def test_schedules_at_every_step(kind, expected):
    cfg = dataclasses.replace(CFG, lr=3.0, schedule=kind, final_lr_ratio=0.2, decay_steps=4)
    got = rates(cfg, 10, range(10))
    np.testing.assert_allclose(got, 3 * np.array(expected), rtol=1e-5)


def test_schedule_without_ramps_is_flat_and_ends_at_the_final_ratio_after_the_run():
    flat = dataclasses.replace(CFG, warmup_steps=0, decay_steps=0)
    np.testing.assert_allclose(rates(flat, 4, [0, 3, 9]), 0.01, rtol=1e-6)
    ramp = dataclasses.replace(CFG, final_lr_ratio=0.1)
    np.testing.assert_allclose(rates(ramp, 5, [5, 99]), 0.001, rtol=1e-5)


@pytest.mark.parametrize("size", [0.01, 30.0], ids=["unclipped", "clipped"])
def test_equals_numpy_adamw_with_the_auxiliary_router_apart(params, size):
    grads = [random_like(params, seed, size) for seed in range(STEPS)]
    got, _ = run(CFG, params, grads)
    lr = np.asarray(rates(CFG, STEPS, range(STEPS)))
    start, got = flatten(params), flatten(got)
    decay = {"embed.weight", "shared.mlp.up", "router.main.weight", "router.aux.weight"}
    main = set(start) - {"router.aux.weight", "router.bias"}
    want = numpy_adamw(CFG, start, grads, lr, decay, main)
    aux = {"router.aux.weight"}
    want |= numpy_adamw(CFG, start, grads, CFG.aux_router_lr_ratio * lr, decay, aux)
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, rtol=2e-5, atol=2e-6, err_msg=path)
    np.testing.assert_array_equal(got["router.bias"], start["router.bias"])


def test_equals_the_optax_chain(params):
    del params["router"]
    grads = [random_like(params, seed, 3.0) for seed in range(STEPS)]
    mask = nest({path: optimizer.decays(path) for path in optimizer.paths(params)})
    chain = optax.chain(
        optax.clip_by_global_norm(CFG.clip_norm),
        optax.adamw(
            optimizer.schedule(CFG, STEPS), CFG.b1, CFG.b2, CFG.eps, weight_decay=0.1, mask=mask
        ),
    )

    @jax.jit
    def step(params, state, g):
        updates, state = chain.update(g, state, params)
        return optax.apply_updates(params, updates), state

    want, state = params, jax.jit(chain.init)(params)
    for g in grads:
        want, state = step(want, state, g)
    got, _ = run(CFG, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_only_matrices_shrink_without_gradients(params):
    cfg = dataclasses.replace(CFG, warmup_steps=0, decay_steps=0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    before, after = flatten(params), flatten(run(cfg, params, [zeros])[0])
    factors = {path: (after[path] / before[path]).flat[0] for path in before}
    plain, aux = 1 - cfg.lr * 0.1, 1 - cfg.aux_router_lr_ratio * cfg.lr * 0.1
    want = {
        "embed.weight": plain,
        "norm.scale": 1.0,
        "shared.mlp.up": plain,
        "shared.norm1.scale": 1.0,
        "router.main.weight": plain,
        "router.aux.weight": aux,
        "router.bias": 1.0,
    }
    assert factors == pytest.approx(want, rel=1e-6)


def test_a_large_auxiliary_gradient_does_not_clip_the_rest(params):
    grads = [random_like(params, 1, 0.01)] * 3
    loud = nest(flatten(grads[0]))
    loud["router"]["aux"]["weight"] = loud["router"]["aux"]["weight"] * 1e6
    quiet, norms = flatten(run(CFG, params, grads)[0]), optimizer.global_norms(loud)
    got = flatten(run(CFG, params, [loud] * 3)[0])
    for path in set(quiet) - {"router.aux.weight"}:
        np.testing.assert_array_equal(got[path], quiet[path], err_msg=path)
    assert norms.aux > 1e3 > 1 > norms.main


def test_a_step_that_is_not_ok_changes_nothing(params):
    tx = optimizer.make_optimizer(CFG, STEPS, params)
    step, before, state = stepper(tx), params, tx.init(params)
    for seed in range(3):
        before, state = step(before, state, random_like(params, seed), True)
    for bad in (np.nan, np.inf):
        broken = random_like(params, 0, bad)
        after = step(before, state, broken, False)
        jax.tree.map(np.testing.assert_array_equal, after, (before, state))
    resumed, state = step(*after, random_like(params, 3), True)
    assert int(state["count"]) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(resumed))


def test_state_is_a_plain_dictionary_of_float32_moments(params):
    state = optimizer.make_optimizer(CFG, STEPS, params).init(params)
    assert type(state) is dict and sorted(state) == ["count", "mu", "nu"]
    assert optimizer.paths(state["mu"]) == optimizer.paths(state["nu"]) == optimizer.paths(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state["nu"])} == {"float32"}
    assert state["count"].dtype == jnp.int32


def test_update_needs_no_scratch_copy_of_the_parameters(params):
    # One fused pass a leaf: temporary memory stays far below one copy of the arrays.
    params = {"embed": {"weight": jnp.ones((256, 128))}, "norm": {"scale": jnp.ones(128)}}
    tx = optimizer.make_optimizer(CFG, STEPS, params)

    def step(params, state, grads):
        ok = jnp.isfinite(optimizer.global_norms(grads).main)
        updates, state = tx.update(grads, state, params, ok=ok)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory = jitted.lower(params, tx.init(params), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 256 * 128 / 4


def test_gradients_of_other_parameters_are_refused(params):
    tx = optimizer.make_optimizer(CFG, STEPS, params)
    grads = {"embed": params["embed"]}
    with pytest.raises(ValueError, match=r"made for the parameters .*router\.bias.*embed\.weight"):
        tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match="params=None"):
        tx.update(params, tx.init(params))
