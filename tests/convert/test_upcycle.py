"""Plain models that become recursive and routed ones: options, shapes, layers, routers, memory."""

import dataclasses
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import BASE, batch

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays, flatten, from_arrays, nested
from mor_jax.convert.init_strategies import STRATEGIES, select_layers
from mor_jax.convert.upcycle import (
    UpcycleOptions,
    parse_upcycle,
    upcycle,
    upcycle_notes,
    upcycled_config,
)
from mor_jax.models.params import abstract_params, forward

PLAIN = dataclasses.replace(BASE, num_layers=8)
PARAMS = random_params(PLAIN)


def made(wish, plain=PLAIN, params=PARAMS):
    """Configuration and parameter tree."""
    cfg = upcycled_config(plain, wish)
    tree = nested(upcycle(plain, cfg, from_arrays(dict(flatten(params))), wish))
    return cfg, jax.tree.map(jnp.asarray, tree)


def wishes():
    for sharing, routing, init in itertools.product(
        ("cycle", "sequence", "middle_cycle", "middle_sequence"),
        ("none", "expert", "token"),
        STRATEGIES,
    ):
        if routing == "none" or not sharing.endswith("sequence"):
            yield UpcycleOptions(recursions=3, sharing=sharing, routing=routing, init=init)


def test_every_wish_gives_the_parameters_of_its_model():
    for wish in wishes():
        cfg, params = made(wish)
        shapes = jax.tree.map(lambda x: x.shape, abstract_params(cfg))
        assert jax.tree.map(np.shape, params) == shapes, wish
        assert cfg.num_layers == (6 if cfg.sharing in ("cycle", "sequence") else 8)
        chosen = select_layers(cfg.sharing, 8, 3, wish.init)
        for slot, sources in enumerate(chosen.slots):
            wanted = np.mean([PARAMS["layers"]["mlp"]["up"][i] for i in sources], axis=0)
            np.testing.assert_allclose(params["shared"]["mlp"]["up"][slot], wanted, atol=1e-7)


def test_one_recursion_computes_what_the_plain_model_does():
    cfg, params = made(UpcycleOptions(recursions=1, sharing="middle_cycle"))
    rows = batch(PLAIN)
    got, wanted = (forward(c, p, rows).hidden for c, p in ((cfg, params), (PLAIN, PARAMS)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_routers_are_new_seeded_and_of_the_width_of_a_fresh_model(routing):
    wish = UpcycleOptions(recursions=3, routing=routing)
    wide = dataclasses.replace(PLAIN, hidden_size=512, init_std=0.02)
    cfg, params = made(wish, wide, random_params(wide))
    again = made(wish, wide, random_params(wide))[1]["router"]
    other = made(dataclasses.replace(wish, seed=1), wide, random_params(wide))[1]["router"]
    weight = params["router"]["main"]["weight"]
    assert np.std(weight) == pytest.approx(0.02, rel=0.1) and abs(np.mean(weight)) < 2e-3
    np.testing.assert_array_equal(weight, again["main"]["weight"])
    assert np.all(weight != other["main"]["weight"])
    assert cfg.router.activation == ("sigmoid" if routing == "expert" else "softmax")


def test_a_bias_starts_at_zero(monkeypatch):
    from mor_jax.convert import upcycle as module

    router = dataclasses.replace(module.ROUTERS["token"], load_balancing="loss_free")
    monkeypatch.setitem(module.ROUTERS, "token", router)
    _, params = made(UpcycleOptions(recursions=3, routing="token"))
    np.testing.assert_array_equal(params["router"]["bias"], np.zeros(3))


def test_layers_that_do_not_fit_are_told():
    plain = dataclasses.replace(PLAIN, num_layers=10)
    wish = UpcycleOptions(recursions=3, sharing="middle_cycle", routing="expert")
    cfg = upcycled_config(plain, wish)
    chosen = select_layers("middle_cycle", 10, 3, "stepwise")
    assert cfg.num_layers == len(chosen.source_layers) == 8
    told, fit = upcycle_notes(plain, wish)
    layers = ", ".join(str(slot[0]) for slot in chosen.slots)
    assert "2 shared layers run 3 times, plus an unshared first and last layer" in told
    assert (
        f"stepwise: initialised from layers {layers} (counted from 0)" in told
        and "new expert" in told
    )
    rest = sorted(set(range(10)) - set(chosen.source_layers))
    assert "10 layers do not fit middle_cycle with 3 recursions: 8 evenly" in fit
    assert fit.endswith(f"without layers {rest[0]}, {rest[1]}")
    assert len(upcycle_notes(PLAIN, wish)) == 1


def test_options_from_text():
    text = (
        "recursions=2,sharing=cycle,init=average,routing=token,kv=shared,share_norms=false,seed=7"
    )
    wanted = UpcycleOptions(
        recursions=2,
        sharing="cycle",
        init="average",
        routing="token",
        kv="shared",
        share_norms=False,
        seed=7,
    )
    assert parse_upcycle(text) == wanted
    assert parse_upcycle("recursions=3") == UpcycleOptions(recursions=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "recursion=3",
            r"upcycle='recursion=3': unknown key; known are recursions, .*mean recursions=",
        ),
        ("recursions", "has no value"),
        ("recursions=0", r"upcycle\.recursions='0': must be a whole number from 1"),
        ("recursions=2,recursions=3", "given twice"),
        ("recursions=2,init=steps", r"upcycle\.init='steps': must be one of .*mean 'stepwise'"),
        ("recursions=2,sharing=none", r"upcycle\.sharing='none': must be one of"),
        ("recursions=2,share_norms=1", "must be true or false"),
        ("sharing=cycle", "does not say how many recursions"),
        ("", "does not say how many recursions"),
    ],
)
def test_a_wrong_option_names_itself_and_what_is_right(text, message):
    with pytest.raises(ValueError, match=message):
        parse_upcycle(text)


@pytest.mark.parametrize(
    ("plain", "wish", "message"),
    [
        (upcycled_config(PLAIN, UpcycleOptions(recursions=2)), {}, "without shared layers"),
        (PLAIN, {"recursions": 7}, r"layers=8: middle_cycle with recursions=7 needs 2 \+ 7"),
        (PLAIN, {"kv": "shared_update"}, r"upcycle\.kv_mode='shared_update'"),
        (PLAIN, {"sharing": "sequence", "routing": "expert"}, "routed models repeat the whole"),
    ],
)
def test_impossible_models_are_refused(plain, wish, message):
    with pytest.raises(ValueError, match=message):
        upcycled_config(plain, UpcycleOptions(**{"recursions": 2, **wish}))


def test_memory_is_that_of_one_array_and_every_stack_is_read_once():
    plain = dataclasses.replace(PLAIN, num_layers=20, intermediate_size=2048, hidden_size=64)
    wish = UpcycleOptions(recursions=3, init="average")
    cfg = upcycled_config(plain, wish)
    read = []
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(plain))}

    def reader(name):
        read.append(name)
        return np.ones(shapes[name], np.float32)

    source = LazyArrays("x", {name: ArraySpec(shape) for name, shape in shapes.items()}, reader)
    params = upcycle(plain, cfg, source, wish)
    largest = 4 * max(np.prod(shape) for shape in shapes.values())
    tracemalloc.start()
    for name in params.specs:
        params.read(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(read) == sorted(shapes)
    # A stack, what is made of it, and a layer or two.
    assert peak < 1.8 * largest
