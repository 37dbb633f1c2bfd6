"""Rotary settings of config.json: what transformers makes of them, or a refusal that names both."""

import copy

import numpy as np
import pytest
from support.rope_settings import LLAMA3
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mor_jax.convert.hf_rope import rope

LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}

# Told once, or twice alike.
TAKEN = {
    "silent": {},
    "at the top": {"rope_theta": 500},
    "null where another tells": {"rope_theta": None, "rope_parameters": DEFAULT},
    "inside": {"rope_parameters": {"rope_theta": 7.0}},
    "linear": {"rope_scaling": LINEAR},
    "old name": {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}},
    "both names": {"rope_scaling": {"type": "linear", **LINEAR}},
    "both groups": {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 10000.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    "length beside": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"},
        "original_max_position_embeddings": 16,
    },
    "falsy": {"rope_scaling": None, "rope_parameters": {}},
    "whole heads": {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}},
    "no stretching": {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_turns_as_in_transformers(name):
    theta, scaling = rope(TAKEN[name], "c")
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, **copy.deepcopy(TAKEN[name])))
    turns = theta ** -(np.arange(0, 8, 2) / 8)
    if scaling.rope_type == "linear":
        turns = turns / scaling.factor
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        cycles = scaling.original_max_position_embeddings * turns / (2 * np.pi)
        kept = np.clip((cycles - low) / (high - low), 0, 1)
        turns = turns * (kept + (1 - kept) / scaling.factor)
    np.testing.assert_allclose(turns, theirs.inv_freq.numpy(), rtol=1e-5)
    assert theirs.attention_scaling == 1.0


TWICE = "is given twice"
REFUSED = {
    "linear beside default": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": DEFAULT},
        ["rope_scaling.rope_type='linear'", "rope_parameters", "'default'", "transformers uses"],
    ),
    "default beside linear": (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR},
        ["rope_scaling.rope_type='default'", "rope_type is 'linear'"],
    ),
    "yarn beside default": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": DEFAULT},
        ["rope_scaling.rope_type='yarn'", "supported kinds are default, linear, llama3"],
    ),
    "base dropped by transformers": (
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 5.0}},
        ["rope_scaling.rope_theta=10000.0", "rope_theta is 5.0"],
    ),
    "two bases": (
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}},
        ["rope_parameters.rope_theta=5.0", TWICE, "rope_theta=7.0"],
    ),
    "two factors": (
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
        ["rope_scaling.factor=4.0", "factor is 2.0"],
    ),
    "two kinds": (
        {"rope_scaling": LINEAR | {"type": "llama3"}},
        ["rope_scaling.type='llama3'", TWICE, "rope_type='linear'"],
    ),
    "two lengths": (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        ["rope_scaling.original_max_position_embeddings=32", TWICE, "=16"],
    ),
    "no kind": (
        {"rope_scaling": {"factor": 4.0}},
        ["rope_scaling.factor=4.0", "without a rope"],
    ),
    "idle factor": (
        {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
        ["rope_scaling.factor=4.0", "rope_type='default'"],
    ),
    "kinds of layers": (
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT}},
        ["rope_parameters.full_attention", "settings of single layers"],
    ),
    "no number of llama3": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"}},
        ["lacks these numbers of llama3", "original_max_position_embeddings"],
    ),
    "part of a head": (
        {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
        ["partial_rotary_factor=0.5"],
    ),
    "no group": ({"rope_scaling": "linear"}, ["rope_scaling='linear'", "group of settings"]),
    "kind null": ({"rope_scaling": LINEAR | {"rope_type": None}}, ["rope_scaling.rope_type=None"]),
    "kind a list": ({"rope_scaling": {"rope_type": []}}, ["rope_scaling.rope_type=[]"]),
    "squeezed": ({"rope_scaling": LINEAR | {"factor": "4"}}, ["rope_scaling.factor='4'"]),
}
BASES = [0, -1.0, float("nan"), float("inf"), 10**400, True, "10000", [[]], {}, None]


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_naming_both(name):
    settings, words = REFUSED[name]
    with pytest.raises(ValueError) as error:
        rope(settings, "config.json")
    assert all(word in str(error.value) for word in ["config.json: ", *words]), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", BASES, ids=lambda base: str(base)[:9])
def test_bases_that_are_none_are_refused(base):
    for settings in ({"rope_theta": base}, {"rope_parameters": {"rope_theta": base}}):
        with pytest.raises(ValueError, match=r"rope_theta.*(must be a number|settings of)"):
            rope(settings, "c")
