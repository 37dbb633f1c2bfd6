"""Eight devices compute what one does; parameters lie as the table says; routing stays local."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.seeded import random_params
from support.tiny import TINY, batch, train_config

from mor_jax.config import MeshConfig, ShardingConfig
from mor_jax.distributed import collectives
from mor_jax.distributed.mesh import make_mesh, param_shardings, spec_of, state_shardings
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.planning.hlo.collectives import Network, tally
from mor_jax.planning.hlo.text import parse_module
from mor_jax.training.compiled_step import jitted_steps
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.run import place
from mor_jax.training.train_state import TrainState, new_state

MESHES = {
    "fsdp": MeshConfig(data=1, fsdp=8, tensor=1),
    "data": MeshConfig(data=8, fsdp=1, tensor=1),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp and tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "slices": MeshConfig(slice=2, data=1, fsdp=4, tensor=1),
}
ONE = MeshConfig(data=1, fsdp=1, tensor=1)
VARIANTS = ("plain", "middle_cycle", "expert", "expert_kv", "token", "token_kv")
STEPS = 8


def config(name, shared_layers=1, recursions=2, **changes):
    """Eight rows a step. Each recursion more adds a third to the time of compiling."""
    model = TINY[name]
    if model.is_middle:
        layers = 2 + shared_layers * recursions
        model = dataclasses.replace(model, num_layers=layers, num_recursions=recursions)
    return train_config(model=model, batch_size=8, steps=STEPS, **changes)


def placed_state(cfg, mesh):
    """A fresh state on the mesh, and its shardings."""
    params = random_params(cfg.model)
    state = new_state(params, make_optimizer(cfg.optim, cfg.steps, params).init(params))
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    axes = param_shardings(mesh, logical_axes(cfg.model), abstract_params(cfg.model))
    shardings = TrainState(**state_shardings(mesh, fields, axes))
    # A copy: steps donate their state, and device_put may hand out the cached parameters.
    return jax.device_put(jax.tree.map(jnp.copy, state), shardings), shardings


def compiled_step(cfg, mesh):
    """The train step for the mesh, compiled."""
    state, _ = placed_state(cfg, mesh)
    step = jitted_steps(cfg)(capacity_tokens(cfg.model, cfg.seq_len))
    with jax.set_mesh(mesh):
        return step.lower(state, place(mesh, batch(cfg.model, 8, cfg.seq_len))).compile()


@cache
def losses(name, mesh_config, **changes):
    """Loss and gradient norm of each step; checks on the way that nothing moves elsewhere."""
    cfg = config(name, **changes)
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
    state, shardings = placed_state(cfg, mesh)
    step, found = compiled_step(cfg, mesh), []
    for seed in range(STEPS):
        state, metrics = step(state, place(mesh, batch(cfg.model, 8, 16, seed)))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    # Results in another place than the arguments would compile the second step anew.
    same = jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), state, shardings)
    assert all(jax.tree.leaves(same))
    return np.array(found)


# Every variant where all axes are cut at once; every other mesh; routing where only rows and
# parameters are cut, within a slice and over slices.
CASES = [(name, "all", 2) for name in VARIANTS if name != "expert"]
CASES += [("plain", mesh, 2) for mesh in MESHES if mesh != "all"]
CASES += [("expert", mesh, 2) for mesh in ("fsdp", "slices")]
# The third recursion chooses among the tokens of the second.
CASES += [("expert", "all", 3)]


@pytest.mark.parametrize(("name", "mesh", "recursions"), CASES)
def test_eight_devices_compute_what_one_does(name, mesh, recursions):
    many, one = (losses(name, where, recursions=recursions) for where in (MESHES[mesh], ONE))
    np.testing.assert_allclose(many[:, 0], one[:, 0], rtol=1e-5)
    np.testing.assert_allclose(many[:, 1], one[:, 1], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("middle_cycle", {"sharding": ShardingConfig(all_gather_shared="per_recursion")}),
        ("middle_sequence", {"sharding": ShardingConfig(all_gather_shared="per_recursion")}),
        ("expert_aux_router", {"grad_accum_steps": 2}),
        ("token_loss_free", {}),
        # The balancing loss multiplies two means over the batch.
        ("token", {"grad_accum_steps": 2}),
    ],
)
def test_ways_of_gathering_and_accumulating_change_nothing(name, changes):
    mesh = MeshConfig(data=2, fsdp=2, tensor=1, slice=2)
    if "grad_accum_steps" in changes:
        mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    many, one = losses(name, mesh, **changes), losses(name, ONE)
    np.testing.assert_allclose(many[:, 0], one[:, 0], rtol=1e-5)


def test_parameters_are_cut_as_the_table_says():
    mesh = make_mesh(MESHES["all"])
    cfg = TINY["expert"]
    cut = param_shardings(mesh, logical_axes(cfg), abstract_params(cfg))
    assert cut["embed"]["weight"].spec == PartitionSpec("tensor", "fsdp")
    assert cut["shared"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert cut["shared"]["mlp"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert cut["norm"]["scale"].spec == PartitionSpec("fsdp")


def test_what_does_not_divide_is_refused_by_name():
    cfg = dataclasses.replace(TINY["plain"], num_heads=3, num_kv_heads=1)
    with pytest.raises(ValueError, match=r"kv_heads=1: .*layers\.attention\.k is sharded over 2"):
        param_shardings(make_mesh(MESHES["all"]), logical_axes(cfg), abstract_params(cfg))
    with pytest.raises(ValueError, match=r"axis='colour': must be one of .* Add it to mesh\.RULES"):
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


def program(name, mesh=MESHES["fsdp"], **changes):
    """The optimised HLO of a train step."""
    return compiled_step(config(name, **changes), make_mesh(mesh)).as_text()


def gathered_bytes(name, label, **changes):
    # Of a scan over a single layer the compiler makes no loop, and sees gathers that are the same.
    how = ShardingConfig(**changes)
    module = parse_module(program(name, sharding=how, shared_layers=2))
    found = tally(module, Network(devices=8, slice_size=8)).runs.items()
    labelled = [(one, runs) for one, runs in found if re.search(rf"\b{label}\)*/", one.op_name)]
    return sum(one.bytes * runs for one, runs in labelled if one.kind == "all-gather")


@pytest.mark.parametrize("name", ["middle_cycle", "middle_cycle_kv", "expert_kv"])
def test_the_shared_block_is_gathered_once_whatever_the_recursions(name):
    cfg = config(name, shared_layers=2).model
    shared = 4 * 7 / 8 * sum(x.size for x in jax.tree.leaves(abstract_params(cfg)["shared"]))
    once = gathered_bytes(name, "gather_shared", all_gather_shared="once")
    assert once == pytest.approx(shared)
    again = gathered_bytes(name, "gather_shared", all_gather_shared="per_recursion")
    # Forward, and again for the gradient.
    assert again > (2 * cfg.num_recursions - 1) * shared


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, "fsdp") for name in ("expert", "expert_kv_update", "token", "token_kv")),
        *(("expert", mesh) for mesh in ("data", "slices")),
    ],
)
def test_only_parameters_gradients_and_sums_leave_a_device(name, mesh):
    # Rows of 23 tokens, of which a recursion keeps 11: no size of a parameter is a multiple.
    lines = program(name, MESHES[mesh], seq_len=23).splitlines()
    kinds = r"(all-[a-z]+|reduce-scatter|collective-[a-z]+)(-start)?\("
    exchanges = [found.group(1) for line in lines if (found := re.search(rf"= (.*) {kinds}", line))]
    sizes = {
        int(n)
        for types in exchanges
        for dims in re.findall(r"\[([\d,]+)\]", types)
        for n in dims.split(",")
    }
    assert 32 in sizes
    assert [n for n in sizes if n % 23 == 0 or n % 11 == 0] == []


@pytest.mark.parametrize(
    ("names", "sizes"), [(("embed", "mlp"), (16, 6)), (("layers", "heads", "embed"), (2, 3, 16))]
)
def test_two_rounds_exchange_what_one_does(names, sizes, monkeypatch):
    x = jax.random.normal(jax.random.key(0), sizes)
    weights = jax.random.normal(jax.random.key(1), (8, *sizes))
    cut = spec_of(names)

    def mine(x, weights):
        full, back = jax.vjp(lambda x: collectives.all_gather_param(x, names, sizes), x)
        return full[None], back(weights[0])[0]

    def exchanged():
        rows = spec_of(("batch",))
        with jax.set_mesh(make_mesh(MESHES["fsdp"])):
            return jax.jit(collectives.shard_map_over_batch(mine, (cut, rows), (rows, cut)))(
                x, weights
            )

    one = exchanged()
    # As on TPUs, where a slice is larger.
    monkeypatch.setattr(collectives, "platform", lambda: "tpu")
    monkeypatch.setattr(collectives, "ONE_ROUND", 2)
    two = exchanged()
    np.testing.assert_array_equal(two[0], np.broadcast_to(x, (8, *sizes)))
    np.testing.assert_array_equal(two[0], one[0])
    np.testing.assert_allclose(two[1], weights.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one[1], weights.sum(0), rtol=1e-5, atol=1e-5)
