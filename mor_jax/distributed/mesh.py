"""The device mesh, the rules from logical axes to mesh axes, and the resulting shardings.

Nothing is replicated silently: an axis without a rule, or a size that the mesh does not divide, is
an error that names the parameter.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.extend.backend import get_backend
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.config import MeshConfig
from mor_jax.config.parsing import check, fail
from mor_jax.types import Params

AXES = ("slice", "data", "fsdp", "tensor")

# Logical axis of a parameter or of a batch -> mesh axes that shard it; (): replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "length": ("tensor",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "router_hidden": ("tensor",),
    "head_dim": (),
    "layers": (),
    "recursions": (),
}


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES` over `devices` (default: all of them).

    On TPUs neighbours in the mesh are neighbours in the slice, and axis `slice` runs over slices;
    on other platforms devices are in the order of their processes.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or `slice` is not the number
            of TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(cfg, name) for name in AXES}
    product = int(np.prod([size for size in sizes.values() if size is not None]))
    rule = f"the axes multiply to {product}, but there are {len(devices)} devices"
    fix = "Set one axis to None to use all remaining devices"
    if None in sizes.values():
        axis = max((n for n, size in sizes.items() if size is not None), key=lambda n: sizes[n])
        others = product // sizes[axis]
        fit = [s for s in range(1, sizes[axis]) if len(devices) % (others * s) == 0]
        fix = f"Try mesh.{axis}={fit[-1]}" if fit else "Make their product divide the devices"
    fits = len(devices) % product == 0 if None in sizes.values() else len(devices) == product
    check(fits, "mesh", sizes, rule, fix)
    shape = tuple(len(devices) // product if size is None else size for size in sizes.values())
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    # Devices of a topology description have a slice_index only if there are several slices.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    rule = f"the devices are in {slices} slices, connected only by the data-centre network"
    check(shape[0] == slices, "mesh.slice", shape[0], rule, f"Set it to {slices}")
    inside, between = (1, *shape[1:]), (slices, 1, 1, 1)
    grid = create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch: batch sizes are multiples of it."""
    return int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))


def check_batch_size(mesh: Mesh, path: str, rows: int, parts: int = 1) -> None:
    """Raises `ValueError` unless the devices can shard each of `parts` micro-batches evenly.

    path: the setting that holds the batch size `rows`.
    """
    shards = batch_shards(mesh)
    unit = shards * parts
    rule = f"must be a multiple of {unit}: {shards} devices (mesh axes {RULES['batch']}) shard "
    rule += f"each of {parts} micro-batches" if parts > 1 else "it"
    check(rows % unit == 0, path, rows, rule, f"Try {-(-rows // unit) * unit}")


def check_seq_len(mesh: Mesh, length: int) -> None:
    """Raises `ValueError` unless the devices that share a sequence split its `length` evenly."""
    shards = int(np.prod([mesh.shape[axis] for axis in RULES["length"]]))
    rule = f"must be a multiple of {shards}, the devices (mesh axes {RULES['length']}) that share "
    rule += "a sequence"
    check(length % shards == 0, "seq_len", length, rule, f"Try {-(-length // shards) * shards}")


def spec_of(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes. Raises `ValueError` on an unknown one."""
    for axis in axes:
        if axis not in RULES:
            fail("axis", axis, f"must be one of {sorted(RULES)}", "Add it to mesh.RULES")
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def param_specs(axes: Params) -> Params:
    """The partition of every parameter, from the tree of its logical axes."""
    return jax.tree.map(spec_of, axes, is_leaf=lambda names: isinstance(names, tuple))


def param_shardings(mesh: Mesh, axes: Params, shapes: Params) -> Params:
    """A sharding for every parameter, from its logical axes and its shape.

    Raises:
        ValueError: a size is not a multiple of the number of its shards.
    """

    def sharding(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        for name, size in zip(names, shape.shape, strict=True):
            parts = int(np.prod([mesh.shape[axis] for axis in RULES.get(name, ())]))
            rule = f"axis {name!r} of {where} is sharded over {parts} devices ({RULES.get(name)})"
            check(size % parts == 0, name, size, rule, "Use a mesh that divides it")
        return NamedSharding(mesh, spec_of(names))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def state_shardings(mesh: Mesh, abstract: Any, params: Params) -> Any:
    """Shardings of a train state: moments are sharded as their parameters, scalars replicated.

    abstract: any tree that contains copies of the parameter tree. params: of `param_shardings`.
    """
    structure = jax.tree.structure(params)
    replicated = NamedSharding(mesh, PartitionSpec())

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: params if is_params(node) else replicated, abstract, is_leaf=is_params
    )


def platform() -> str:
    """Platform of the computation: `cpu`, `tpu`, `cuda` or `rocm`.

    That of the current mesh (`jax.set_mesh`), which may be a topology description; without a mesh,
    that of this process's devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = get_backend().platform if device is None else device.platform
    if name != "gpu":
        return name
    return "rocm" if "rocm" in get_backend().platform_version.lower() else "cuda"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batch axis sharded over all data-parallel devices, positions replicated."""
    return NamedSharding(mesh, spec_of(("batch",)))
