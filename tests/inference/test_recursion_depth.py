"""Fewer or more recursions than a model was trained with."""

import dataclasses

import jax
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY, batch

from mor_jax.inference import recursion_depth
from mor_jax.inference.recursion_depth import with_recursions
from mor_jax.models.params import abstract_params, forward
from mor_jax.models.routing.router import Route

LOOPED = [name for name, cfg in TINY.items() if cfg.sharing != "none"]


def hidden(cfg, params, thresholds=None):
    route = Route(mode="causal", thresholds=thresholds)
    return np.asarray(jax.jit(lambda p, b: forward(cfg, p, b, route).hidden)(params, batch(cfg)))


@pytest.mark.parametrize("name", TINY)
def test_the_trained_number_changes_nothing(name):
    cfg, params = TINY[name], random_params(TINY[name])
    made = with_recursions(cfg, params, cfg.num_recursions, (0.5,) * cfg.num_recursions)
    assert made == (cfg, params, (0.5,) * cfg.num_recursions)


@pytest.mark.parametrize("name", LOOPED)
def test_every_number_that_is_not_refused_has_the_arrays_of_its_model(name):
    cfg, params = TINY[name], random_params(TINY[name])
    for number in (1, 2, 3, 5):
        if number > cfg.num_recursions and (not cfg.share_norms or cfg.router.kind == "token"):
            rule = "norms of its own" if not cfg.share_norms else "token-choice scores the"
            with pytest.raises(ValueError, match=rf"recursions={number}: .*{rule}.*at most \d"):
                with_recursions(cfg, params, number)
            continue
        made, kept, _ = with_recursions(cfg, params, number)
        ends = 2 * cfg.is_middle
        assert (made.num_recursions, made.num_layers) == (number, ends + number * cfg.shared_layers)
        shapes = jax.tree.map(lambda x: x.shape, kept)
        assert shapes == jax.tree.map(lambda x: x.shape, abstract_params(made))


@pytest.mark.parametrize("name", ["middle_cycle_kv", "expert_kv_update", "token_cycle"])
def test_fewer_is_the_model_whose_later_recursions_do_nothing(name):
    """Nobody goes on, or what goes on is not looked at: the later recursions do not matter."""
    cfg, params = TINY[name], random_params(TINY[name])
    made, kept, thresholds = with_recursions(cfg, params, 2, (0.0, -0.1, 0.2))
    assert thresholds == (0.0, -0.1)
    found = hidden(made, kept, thresholds)
    if cfg.router.kind == "expert":
        wanted = hidden(cfg, params, (0.0, -0.1, 1e30))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        return
    # A model of two recursions, built as such, with the parameters that concern it.
    router = cfg.router if cfg.router.kind == "token" else TINY["middle_cycle"].router
    layers = 2 * cfg.is_middle + 2 * cfg.shared_layers
    built = dataclasses.replace(cfg, num_recursions=2, num_layers=layers, router=router)
    wanted = params
    if cfg.router.kind == "token":
        wanted = {**params, "router": {"main": {"weight": params["router"]["main"]["weight"][:2]}}}
    np.testing.assert_array_equal(found, hidden(built, wanted))


def test_more_repeats_the_last_router_and_its_threshold():
    cfg, params = TINY["expert"], random_params(TINY["expert"])
    made, kept, thresholds = with_recursions(cfg, params, 5, (0.0, -0.3, -0.2))
    assert made.router.capacity == (1.0, 2 / 3, 1 / 3, 1 / 3, 1 / 3)
    assert thresholds == (0.0, -0.3, -0.2, -0.2, -0.2)
    weight = kept["router"]["main"]["weight"]
    np.testing.assert_array_equal(weight[3:], np.stack([weight[2]] * 2))
    # With nobody past the third recursion it is the trained model.
    stopped = (*thresholds[:3], 1e30, 1e30)
    wanted = hidden(cfg, params, thresholds[:3])
    np.testing.assert_allclose(hidden(made, kept, stopped), wanted, atol=1e-5)
    assert np.abs(hidden(made, kept, thresholds) - wanted).max() > 1e-3


def test_what_makes_no_sense_is_refused():
    params = random_params(TINY["plain"])
    with pytest.raises(ValueError, match=r"recursions=2: a vanilla model .* runs its layers once"):
        with_recursions(TINY["plain"], params, 2)
    with pytest.raises(ValueError, match="recursions=0: must be at least 1"):
        with_recursions(TINY["plain"], params, 0)


def test_a_depth_that_nobody_could_compile_is_refused():
    cfg = TINY["expert"]
    with pytest.raises(ValueError, match=r"recursions=100000: makes 200,002 layers.*at most 511"):
        with_recursions(cfg, {}, 100000)


def test_depths_far_from_those_trained_are_said_once(caplog):
    recursion_depth._warn.cache_clear()
    cfg = TINY["expert_cycle"]
    for number in (1, 2 * cfg.num_recursions, 7, 7):
        with_recursions(cfg, random_params(cfg), number)
    [said] = caplog.messages
    assert said.startswith(
        f"recursions=7: more than twice the {cfg.num_recursions} that were trained"
    )
