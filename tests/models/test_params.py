"""Parameter trees: what they hold, how they start, that nothing shared is stored twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import PLAIN, TINY

from mor_jax.models.param_count import unique_parameters
from mor_jax.models.params import abstract_params, init_params, logical_axes, logits_table, paths


@pytest.mark.parametrize("name", TINY)
def test_parameter_tree(name, golden):
    cfg = TINY[name]
    tree, axes = abstract_params(cfg), logical_axes(cfg)
    leaves, structure = jax.tree.flatten(tree)
    rows = zip(paths(tree), leaves, structure.flatten_up_to(axes), strict=True)
    described = {path: f"{x.dtype}{list(x.shape)} {' '.join(named)}" for path, x, named in rows}
    golden(f"trees/{name}.json", described)
    assert sum(leaf.size for leaf in leaves) == unique_parameters(cfg)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_recursions_add_no_parameters_but_routers():
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(abstract_params(TINY[name])))
        for name in ("middle_cycle_kv", "expert", "expert_kv_update", "token")
    }
    assert sizes["expert"] == sizes["expert_kv_update"] == sizes["token"]
    assert sizes["expert"] == sizes["middle_cycle_kv"] + 3 * 32


def test_parameters_start_as_the_configuration_says():
    cfg = TINY["token_loss_free"]
    params = jax.jit(init_params, static_argnums=(0, 1))(cfg, 3)
    by_path = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    matrices = [np.ravel(v) for k, v in by_path.items() if not k.endswith(("scale", "bias"))]
    for values in matrices:
        assert 0.7 * cfg.init_std < np.std(values) < 1.3 * cfg.init_std
        assert abs(np.mean(values)) < 5 * cfg.init_std / len(values) ** 0.5
    numbers = np.concatenate(matrices)
    assert len(np.unique(numbers)) > 0.99 * len(numbers)
    assert all(np.all(v == 1) for k, v in by_path.items() if k.endswith("scale"))
    assert not np.any(by_path["router.bias"])
    again = jax.jit(init_params, static_argnums=(0, 1))(cfg, 3)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, again)))
    other = jax.jit(init_params, static_argnums=(0, 1))(cfg, 4)
    assert not np.any(params["embed"]["weight"] == other["embed"]["weight"])


@pytest.mark.parametrize("name", PLAIN)
def test_logits_come_from_the_head_or_else_the_embedding(name):
    params = random_params(TINY[name])
    assert ("head" in params) == (name == "plain_untied")
    assert logits_table(TINY[name], params) is params.get("head", params["embed"])["weight"]
