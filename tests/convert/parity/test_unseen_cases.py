"""Shapes and options that no recorded case has, against an oracle that reads the state dict."""

import jax
import numpy as np
import pytest
from support.seeded import random_params
from support.state_dict_oracle import Oracle

from mor_jax.convert.parity.compare import by_magnitude
from mor_jax.convert.reference_config import merge_options, model_config
from mor_jax.convert.state_dict import from_params
from mor_jax.models.params import forward, unembed
from mor_jax.types import Batch

RECURSION = {"enable": True, "sharing": "middle_cycle", "num_recursion": 2}
UNSEEN = {
    "plain, wide heads": ({}, 3),
    "sequence, own norms, shared keys": (
        {
            "recursive": RECURSION | {"sharing": "sequence", "ln_share": False},
            "kv_sharing": {"enable": True},
        },
        4,
    ),
    "expert, own norms, first recursion drops tokens, shared keys": (
        {
            "recursive": RECURSION | {"num_recursion": 3, "ln_share": False},
            "mor": {
                "enable": True,
                "capacity": "0.75,0.5,0.2",
                "temp": 0.5,
                "expert": {"router_func": "tanh", "alpha": 0.7},
            },
            "kv_sharing": {"enable": True, "update_cache": True},
        },
        5,
    ),
    "expert, cycle, mlp, five recursions": (
        {
            "recursive": RECURSION | {"sharing": "cycle", "num_recursion": 5},
            "mor": {
                "enable": True,
                "capacity": "1.0,0.8,0.8,0.3,0.1",
                "router_type": "mlp",
                "expert": {"router_func": None, "gating": "additive"},
            },
        },
        5,
    ),
    "token, mlp, bias, shared keys": (
        {
            "recursive": RECURSION,
            "mor": {
                "enable": True,
                "type": "token",
                "router_type": "mlp",
                "token": {"balancing": "loss_free", "router_func": "sigmoid", "alpha": 0.5},
            },
            "kv_sharing": {"enable": True},
        },
        6,
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_shapes_and_options_equal_the_oracle(name):
    blocks, layers = UNSEEN[name]
    hf = {
        "vocab_size": 23,
        "hidden_size": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "intermediate_size": 18,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
    }
    options = merge_options(blocks)
    cfg = model_config(hf, options, tied=False)
    params = random_params(cfg)
    ids = np.random.default_rng(1).integers(0, 23, (2, 17)).astype(np.int32)
    # A row that starts with one token twice has two equal scores, and rounding would rank them.
    assert np.all(ids[:, 0] != ids[:, 1])
    want, depth = Oracle(hf, options, from_params(cfg, params)).run(ids)
    out = jax.jit(forward, static_argnums=0)(cfg, params, Batch(ids, ids))
    if depth is not None:
        assert 0 < depth.mean() < options["recursive"]["num_recursion"]
        np.testing.assert_array_equal(out.routing.depth, depth)
    assert by_magnitude(unembed(cfg, params, out.hidden), want) < 1e-5
