"""The map of names: complete, reversible, and outspoken about what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest
from seeded import random_params
from tiny import TINY

from mor_jax.convert.names import EMBEDDING, HEAD, entries
from mor_jax.convert.state_dict import from_params, is_tied, to_params
from mor_jax.optim import paths
from mor_jax.parameters import unique_parameters

RECURSIVE = TINY["middle_cycle"]
EXPERT = TINY["expert"]
SHARED_QUERY = "model.layers.1.block.0.self_attn.q_proj.weight"
LATER_QUERY = "model.layers.2.block.0.self_attn.q_proj.weight"


def state_of(cfg, **changes):
    return from_params(cfg, random_params(cfg), **changes)


@pytest.mark.parametrize("name", TINY)
def test_round_trip_is_bit_identical(name):
    cfg, params = TINY[name], random_params(TINY[name])
    back = to_params(cfg, from_params(cfg, params))
    assert paths(back) == paths(params)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    state = from_params(cfg, params)
    again = from_params(cfg, to_params(cfg, state))
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", TINY)
def test_unique_tensors_hold_each_parameter_once(name):
    cfg = TINY[name]
    state = state_of(cfg, aliases=False)
    assert sum(value.size for value in state.values()) == unique_parameters(cfg)
    assert {entry.name for entry in entries(cfg) if not entry.is_alias} == state.keys()


def test_layout_is_that_of_torch():
    cfg = dataclasses.replace(EXPERT, kv_heads=1)
    params = random_params(cfg)
    state = from_params(cfg, params)
    query = params["shared"]["attention"]["q"][1]
    expected = np.transpose(np.asarray(query), (1, 2, 0)).reshape(-1, cfg.width)
    np.testing.assert_array_equal(state["model.layers.1.block.1.self_attn.q_proj.weight"], expected)
    out = np.asarray(params["first"]["attention"]["o"][0]).reshape(-1, cfg.width)
    np.testing.assert_array_equal(state["model.layers.0.self_attn.o_proj.weight"], out.T)
    assert state["model.layers.0.self_attn.k_proj.weight"].shape == (cfg.head_dim, cfg.width)
    router = params["router"]["main"]["weight"]
    np.testing.assert_array_equal(state["model.layers.3.mor_router.router.weight"], router[2:3])


@pytest.mark.parametrize(
    ("name", "layer", "path", "place"),
    [
        ("cycle", 3, "shared", 1),
        ("sequence", 3, "shared", 1),
        ("sequence", 1, "shared", 0),
        ("middle_cycle", 4, "shared", 1),
        ("middle_sequence", 2, "shared", 0),
        ("middle_sequence", 5, "last", 0),
    ],
)
def test_effective_layers_of_the_sharing_schemes(name, layer, path, place):
    params = random_params(TINY[name])
    gate = from_params(TINY[name], params)[f"model.layers.{layer}.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(gate, params[path]["mlp"]["gate"][place].T)


def test_shared_weights_are_found_under_any_of_their_names():
    state = state_of(EXPERT)
    for name in [key for key in state if ".layers.1.block." in key]:
        del state[name]
    back = to_params(EXPERT, state)
    gate = random_params(EXPERT)["shared"]["mlp"]["gate"]
    np.testing.assert_array_equal(back["shared"]["mlp"]["gate"], gate)


def test_unshared_norms_keep_a_pair_per_effective_layer():
    cfg = TINY["middle_cycle_norms"]
    state = state_of(cfg)
    scale = random_params(cfg)["shared"]["norm1"]["scale"]
    np.testing.assert_array_equal(state["model.layers.4.input_layernorm.weight"], scale[1, 1])


def test_missing_tensor_is_named():
    state = state_of(RECURSIVE)
    for name in ("model.layers.2", "model.layers.4"):
        del state[f"{name}.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*lacks"):
        to_params(RECURSIVE, state)


def test_unknown_tensor_is_named_with_the_nearest_one():
    state = state_of(RECURSIVE) | {"model.layers.0.mlp.gate_proj.wieght": np.zeros((2, 3))}
    with pytest.raises(ValueError, match=r"wieght=\(2, 3\).*nearest name is .*gate_proj\.weight"):
        to_params(RECURSIVE, state)


def test_derived_buffers_of_old_checkpoints_are_no_parameters():
    state = state_of(RECURSIVE) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    assert paths(to_params(RECURSIVE, state)) == paths(random_params(RECURSIVE))


def test_wrong_shape_is_named_with_both_shapes():
    state = state_of(RECURSIVE) | {"model.norm.weight": np.ones(5)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight=\(5,\): must have shape \(32,\)"):
        to_params(RECURSIVE, state)


def test_attention_that_differs_between_recursions_is_refused_with_an_explanation():
    state = state_of(EXPERT)
    state[LATER_QUERY] = state[LATER_QUERY] + 1
    with pytest.raises(ValueError, match=r"older version of the reference") as error:
        to_params(EXPERT, state)
    assert LATER_QUERY in str(error.value) and SHARED_QUERY in str(error.value)


@pytest.mark.parametrize(
    ("part", "fix"),
    [("input_layernorm", "share_norms=False"), ("mlp.up_proj", "Check sharing and recursions")],
)
def test_other_copies_that_differ_are_refused(part, fix):
    state = state_of(EXPERT)
    name = f"model.layers.2.block.0.{part}.weight"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=fix):
        to_params(EXPERT, state)


def test_tensors_decide_whether_embeddings_are_tied():
    tied, untied = state_of(TINY["plain"]), state_of(TINY["plain_untied"])
    assert is_tied(tied) and not is_tied(untied)
    assert is_tied({EMBEDDING: tied[EMBEDDING]})
    with pytest.raises(ValueError, match=rf"{HEAD}=.*tie_embeddings=False"):
        to_params(TINY["plain"], untied)
    del untied[HEAD]
    with pytest.raises(ValueError, match=rf"{HEAD}=None: the state dict lacks it"):
        to_params(TINY["plain_untied"], untied)


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_parameter_tree_of_another_model_is_refused(change):
    params = dict(random_params(RECURSIVE))
    if change == "unknown":
        params["extra"] = {"weight": np.zeros(3)}
    else:
        del params["norm"]
    path = "extra.weight" if change == "unknown" else "norm.scale"
    with pytest.raises(ValueError, match=path):
        from_params(RECURSIVE, params)


def test_parameter_tree_with_too_many_recursions_is_refused():
    params = random_params(dataclasses.replace(RECURSIVE, layers=8))
    with pytest.raises(ValueError, match="each shared one once"):
        from_params(RECURSIVE, params)
