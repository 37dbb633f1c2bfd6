"""Layers of a recursive model from a plain one. The recorded table is checked with the cases."""

import dataclasses

import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays, nested
from mor_jax.convert.init_strategies import STRATEGIES, select_layers, share_layers
from mor_jax.models.params import paths

PLAIN = dataclasses.replace(TINY["plain"], num_layers=6)


def shared(plain, cfg, selection):
    """The tree that is made of the tree of a plain model."""
    return nested(share_layers(from_arrays(dict(flatten(plain))), cfg, selection))


def test_random_draws_differ_by_seed_and_are_sorted_and_distinct():
    draws = {select_layers("cycle", 24, 2, "random", seed).slots for seed in range(4)}
    assert len(draws) > 1
    assert select_layers("cycle", 24, 2, "random", 3) == select_layers("cycle", 24, 2, "random", 3)
    for slots in draws:
        layers = [layer for (layer,) in slots]
        assert layers == sorted(set(layers)) and len(layers) == 12 and layers[-1] < 24


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sharing", ["middle_cycle", "middle_sequence"])
def test_middle_variants_keep_their_ends_and_share_none_of_them(sharing, strategy):
    made = select_layers(sharing, 12, 3, strategy)
    assert made.effective[0] == (0,) and made.effective[-1] == (11,)
    assert all(0 < layer < 11 for slot in made.slots for layer in slot)


def test_one_recursion_keeps_every_layer():
    assert select_layers("cycle", 5, 1, "stepwise").effective == ((0,), (1,), (2,), (3,), (4,))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("middle_cycle", 4, 3, "lower"), "layers=4: middle_cycle with recursions=3 needs 2 \\+ 3"),
        (("none", 4, 2, "lower"), "sharing='none'"),
    ],
)
def test_impossible_selections_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        select_layers(*arguments)


@pytest.mark.parametrize(
    "name", ["cycle", "middle_cycle", "middle_sequence", "middle_cycle_norms", "expert"]
)
def test_shared_tree_is_that_of_the_model_without_routers(name):
    cfg = TINY[name]
    plain = dataclasses.replace(TINY["plain"], num_layers=cfg.num_layers)
    chosen = select_layers(cfg.sharing, cfg.num_layers, cfg.num_recursions, "average")
    made, expected = shared(random_params(plain), cfg, chosen), random_params(cfg)
    expected = {key: value for key, value in expected.items() if key != "router"}
    assert paths(made) == paths(expected)
    for key in ("first", "shared", "last"):
        for group, leaves in made.get(key, {}).items():
            for leaf, array in leaves.items():
                assert array.shape == expected[key][group][leaf].shape
                assert array.dtype == np.float32


def test_layers_land_in_their_slots():
    cfg = dataclasses.replace(TINY["middle_cycle"], share_norms=False)
    plain = random_params(PLAIN)
    made = shared(plain, cfg, select_layers("middle_cycle", 6, 2, "average"))
    up, norm = plain["layers"]["mlp"]["up"], plain["layers"]["norm1"]["scale"]
    np.testing.assert_allclose(made["shared"]["mlp"]["up"][1], (up[2] + up[4]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(made["last"]["mlp"]["up"][0], up[5])
    np.testing.assert_array_equal(made["shared"]["norm1"]["scale"][1, 1], norm[4])
    np.testing.assert_array_equal(made["embed"]["weight"], plain["embed"]["weight"])


def test_unshared_norms_of_sequence_follow_its_order():
    cfg = dataclasses.replace(TINY["sequence"], share_norms=False)
    plain = random_params(TINY["plain"])
    made = shared(plain, cfg, select_layers("sequence", 4, 2, "lower"))
    norm = plain["layers"]["norm2"]["scale"]
    np.testing.assert_array_equal(made["shared"]["norm2"]["scale"][1, 0], norm[2])
    np.testing.assert_array_equal(made["shared"]["norm2"]["scale"][0, 1], norm[1])


def test_selection_for_another_depth_is_refused():
    chosen = select_layers("middle_cycle", 8, 2, "lower")
    with pytest.raises(ValueError, match="the selection makes 8 layers"):
        shared(random_params(PLAIN), TINY["middle_cycle"], chosen)
