"""The map of names: complete, reversible, and outspoken about what does not fit."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY

from mor_jax.checkpoint.lazy_arrays import LazyArrays, flatten, from_arrays
from mor_jax.convert.names import EMBEDDING, HEAD, entries, llama_entries, mor_entries
from mor_jax.convert.state_dict import from_params, to_params
from mor_jax.convert.views import as_params, as_tensors, copy_transposed
from mor_jax.models.param_count import unique_parameters
from mor_jax.models.params import paths

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
    cfg = dataclasses.replace(EXPERT, num_kv_heads=1)
    params = random_params(cfg)
    state = from_params(cfg, params)
    query = params["shared"]["attention"]["q"][1]
    expected = np.transpose(np.asarray(query), (1, 2, 0)).reshape(-1, cfg.hidden_size)
    np.testing.assert_array_equal(state["model.layers.1.block.1.self_attn.q_proj.weight"], expected)
    out = np.asarray(params["first"]["attention"]["o"][0]).reshape(-1, cfg.hidden_size)
    np.testing.assert_array_equal(state["model.layers.0.self_attn.o_proj.weight"], out.T)
    assert state["model.layers.0.self_attn.k_proj.weight"].shape == (cfg.head_dim, cfg.hidden_size)
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


def test_everything_that_does_not_fit_is_listed_with_both_names():
    state = state_of(RECURSIVE) | {
        "model.layers.0.mlp.gate_proj.wieght": np.zeros((2, 3)),
        "model.norm.weight": np.ones(5),
    }
    for name in ("model.layers.2", "model.layers.4"):
        del state[f"{name}.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="state dict: these tensors do not make") as error:
        to_params(RECURSIVE, state)
    lines = [" ".join(line.split()) for line in str(error.value).splitlines()]
    assert "missing model.layers.2.mlp.up_proj.weight (48, 32) (our shared.mlp.up[1])" in lines
    assert "misshapen model.norm.weight (5,), expected (32,) (our norm.scale)" in lines
    nearest = "(the nearest name is model.layers.0.mlp.gate_proj.weight)"
    assert f"unexpected model.layers.0.mlp.gate_proj.wieght (2, 3) {nearest}" in lines
    assert len(lines) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value):
    state = state_of(RECURSIVE)
    state[EMBEDDING] = state[EMBEDDING].copy()
    state[EMBEDDING][3, 3:5] = value
    with pytest.raises(ValueError, match=rf"{EMBEDDING}=.* 2 values that are NaN"):
        to_params(RECURSIVE, state)


def test_derived_buffers_of_old_checkpoints_are_no_parameters():
    state = state_of(RECURSIVE) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    assert paths(to_params(RECURSIVE, state)) == paths(random_params(RECURSIVE))


def test_attention_that_differs_between_recursions_is_refused_with_an_explanation():
    state = state_of(EXPERT)
    state[LATER_QUERY] = state[LATER_QUERY] + 1
    with pytest.raises(ValueError, match=r"older version of the reference") as error:
        to_params(EXPERT, state)
    assert LATER_QUERY in str(error.value) and SHARED_QUERY in str(error.value)


@pytest.mark.parametrize(
    ("part", "fix"),
    [("input_layernorm", "share_norms=False"), ("mlp.up_proj", "Check sharing and num_recursions")],
)
def test_other_copies_that_differ_are_refused(part, fix):
    state = state_of(EXPERT)
    name = f"model.layers.2.block.0.{part}.weight"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=fix):
        to_params(EXPERT, state)


def test_an_untied_unembedding_fits_an_untied_model_alone():
    untied = state_of(TINY["plain_untied"])
    with pytest.raises(ValueError, match=rf"{HEAD}=.*tie_embeddings=False"):
        to_params(TINY["plain"], untied)
    del untied[HEAD]
    with pytest.raises(ValueError, match=rf"missing +{HEAD} "):
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
    params = random_params(dataclasses.replace(RECURSIVE, num_layers=8))
    with pytest.raises(ValueError, match=r"shared\.mlp\.up: \(3, 32, 48\), expected \(2"):
        from_params(RECURSIVE, params)


@pytest.mark.parametrize("name", TINY)
def test_names_of_the_export_hold_each_weight_once_and_lead_back(name):
    cfg, params = TINY[name], dict(flatten(random_params(TINY[name])))
    table = mor_entries(cfg)
    tensors = as_tensors(cfg, table, from_arrays(params))
    stored = sum(np.prod(spec.shape, dtype=int) for spec in tensors.specs.values())
    assert stored == unique_parameters(cfg)
    back = as_params(cfg, table, tensors)
    assert back.specs.keys() == params.keys()
    for path in params:
        np.testing.assert_array_equal(back.read(path), params[path])


def test_names_of_a_plain_export_are_those_of_the_reference():
    cfg = TINY["plain"]
    assert mor_entries(cfg) == llama_entries(cfg) == entries(cfg)


@pytest.mark.parametrize("name", ["sequence", "middle_cycle", "middle_cycle_norms"])
def test_unrolled_names_repeat_what_the_reference_ties(name):
    cfg, params = TINY[name], random_params(TINY[name])
    written = as_tensors(cfg, llama_entries(cfg), from_arrays(dict(flatten(params))))
    tied = from_params(cfg, params)
    assert written.specs.keys() == tied.keys() - {HEAD}
    assert all(np.array_equal(written.read(key), tied[key]) for key in written.specs)


@pytest.mark.parametrize(
    ("name", "why"), [("expert", "different depths"), ("middle_cycle_kv", "kv")]
)
def test_what_no_llama_computes_is_not_unrolled(name, why):
    with pytest.raises(ValueError, match=why):
        llama_entries(TINY[name])


def test_arrays_are_read_once_and_one_at_a_time():
    cfg = TINY["expert"]
    params, reads = from_arrays(dict(flatten(random_params(cfg)))), []

    def read(path):
        reads.append(path)
        return params.read(path)

    tensors = as_tensors(cfg, mor_entries(cfg), LazyArrays("here", params.specs, read))
    for name in tensors.specs:
        tensors.read(name)
    assert sorted(reads) == sorted(params.specs)


@pytest.mark.parametrize("shape", [(5, 7), (300, 500), (64, 3, 700), (3, 700, 64)])
def test_large_arrays_are_turned_like_small_ones(shape):
    source = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for axes in itertools.permutations(range(len(shape))):
        out = np.zeros([shape[i] for i in axes], np.float32)
        copy_transposed(source.transpose(axes), out)
        np.testing.assert_array_equal(out, source.transpose(axes))
