"""Eight devices compute what one does; parameters lie as the table says; routing stays local."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from seeded import random_params
from tiny import TINY, batch, train_config

from mor_jax.config import MeshConfig
from mor_jax.models.router import Route, capacity_counts
from mor_jax.optim import make_optimizer
from mor_jax.sharding import make_mesh, param_shardings, spec_of, state_shardings
from mor_jax.state import TrainState, abstract_params, forward, logical_axes, new_state
from mor_jax.steps import jitted_steps
from mor_jax.train import place

MESHES = {
    "data": MeshConfig(data=8, fsdp=1, tensor=1),
    "fsdp": MeshConfig(data=1, fsdp=8, tensor=1),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}
ONE = MeshConfig(data=1, fsdp=1, tensor=1)


def config(name):
    model = dataclasses.replace(TINY[name], sharing="cycle", layers=2, recursions=2)
    return train_config(model=model, batch_size=8)


def placed_state(cfg, mesh):
    """A fresh state on the mesh, and its shardings."""
    params = random_params(cfg.model)
    state = new_state(params, make_optimizer(cfg.optim, cfg.steps, params).init(params))
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    axes = param_shardings(mesh, logical_axes(cfg.model), abstract_params(cfg.model))
    shardings = TrainState(**state_shardings(mesh, fields, axes))
    # A copy: steps donate their state, and device_put may hand out the cached parameters.
    return jax.device_put(jax.tree.map(jnp.copy, state), shardings), shardings


@cache
def losses(name, mesh_config):
    """Loss and gradient norm of three steps; checks on the way that nothing moves elsewhere."""
    cfg = config(name)
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
    state, shardings = placed_state(cfg, mesh)
    step, found = jitted_steps(cfg)(capacity_counts(cfg.model, cfg.length)), []
    for seed in range(3):
        with jax.set_mesh(mesh):
            state, metrics = step(state, place(mesh, batch(cfg.model, 8, 16, seed)))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    # Results in another place than the arguments would compile the second step anew.
    same = jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), state, shardings)
    assert all(jax.tree.leaves(same))
    return found


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("expert", "data"), ("expert", "fsdp"), ("expert", "all"), ("token", "all")],
)
def test_eight_devices_compute_what_one_does(name, mesh):
    np.testing.assert_allclose(losses(name, MESHES[mesh]), losses(name, ONE), rtol=1e-5)


def collectives(name, mesh_config, mode):
    """Every exchange between devices in a compiled forward pass: (operation, result)."""
    cfg, mesh = config(name).model, make_mesh(mesh_config)
    shardings = param_shardings(mesh, logical_axes(cfg), abstract_params(cfg))
    params = jax.device_put(random_params(cfg), shardings)

    def outputs(params, rows):
        out = forward(cfg, params, rows, Route(mode=mode))
        return out.hidden, out.routing.depth

    with jax.set_mesh(mesh):
        compiled = jax.jit(outputs).lower(params, place(mesh, batch(cfg, 8, 16))).compile()
    found = re.findall(r"= (.*) (all-[a-z-]+|collective-[a-z]+)(?:-start)?\(", compiled.as_text())
    return [(kind, result) for result, kind in found]


@pytest.mark.parametrize(("name", "mode"), [("expert", "topk"), ("expert_kv_update", "causal")])
def test_routing_moves_nothing_between_devices(name, mode):
    assert collectives(name, MESHES["data"], mode) == []


def test_cut_parameters_are_gathered_and_activations_are_not():
    found = collectives("expert", MESHES["fsdp"], "topk")
    gathered = [result for kind, result in found if kind == "all-gather"]
    assert any(result.startswith("f32[32,48]") for result in gathered)
    # An activation would show its 8 rows of 16 or 8 tokens. Only looking up tokens in a cut table
    # exchanges any, once.
    activations = [kind for kind, result in found if re.search(r"f32\[8,(16|8)", result)]
    assert activations == []
    assert [kind for kind, _ in found].count("all-to-all") == 1


def test_parameters_are_cut_as_the_table_says():
    mesh = make_mesh(MESHES["all"])
    cfg = TINY["expert"]
    cut = param_shardings(mesh, logical_axes(cfg), abstract_params(cfg))
    assert cut["embed"]["weight"].spec == PartitionSpec("tensor", "fsdp")
    assert cut["shared"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert cut["shared"]["mlp"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert cut["norm"]["scale"].spec == PartitionSpec("fsdp")


def test_what_does_not_divide_is_refused_by_name():
    cfg = dataclasses.replace(TINY["plain"], heads=3, kv_heads=1)
    with pytest.raises(ValueError, match=r"kv_heads=1: .*layers\.attention\.k is cut over 2"):
        param_shardings(make_mesh(MESHES["all"]), logical_axes(cfg), abstract_params(cfg))
    with pytest.raises(ValueError, match=r"axis='colour': sharding\.RULES knows"):
        spec_of(("embed", "colour"))


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=None), (1, 2, 4, 1)),
        (MeshConfig(data=1, fsdp=4, tensor=2), (1, 1, 4, 2)),
    ],
)
def test_the_axis_left_open_takes_the_rest(mesh, shape):
    assert tuple(make_mesh(mesh).shape.values()) == shape


@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=None, fsdp=3)])
def test_meshes_that_leave_devices_over_are_refused(mesh):
    with pytest.raises(ValueError, match=r"mesh=.*multiply to \d, but there are 8 devices"):
        make_mesh(mesh)
