"""The mesh, the one table from logical axes to mesh axes, and the shardings that follow.

Nothing is replicated silently: an axis that the table does not name, or a size that the mesh does
not divide, is an error that names the parameter.
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

# Logical axis of a parameter or of a batch -> mesh axes that cut it; () keeps it whole.
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
    elsewhere devices stand in the order of their processes.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or `slice` is not the number
            of TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(cfg, name) for name in AXES}
    given = int(np.prod([size for size in sizes.values() if size is not None]))
    rule = f"the axes multiply to {given}, but there are {len(devices)} devices"
    fix = "Set one axis to None, which means the rest"
    if None in sizes.values():
        axis = max((n for n, size in sizes.items() if size is not None), key=lambda n: sizes[n])
        others = given // sizes[axis]
        fit = [s for s in range(1, sizes[axis]) if len(devices) % (others * s) == 0]
        fix = f"Try mesh.{axis}={fit[-1]}" if fit else "Make their product divide the devices"
    fits = len(devices) % given == 0 if None in sizes.values() else len(devices) == given
    check(fits, "mesh", sizes, rule, fix)
    shape = tuple(len(devices) // given if size is None else size for size in sizes.values())
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    # Devices of a topology that is not here only say their slice where there are several.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    rule = f"the devices are in {slices} slices, which only the data-centre network joins"
    check(shape[0] == slices, "mesh.slice", shape[0], rule, f"Set it to {slices}")
    inside, between = (1, *shape[1:]), (slices, 1, 1, 1)
    grid = create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def row_devices(mesh: Mesh) -> int:
    """Devices that take rows of a batch each: a batch is a multiple of so many rows."""
    return int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))


def check_rows(mesh: Mesh, path: str, rows: int, parts: int = 1) -> None:
    """Raises `ValueError` unless each of `parts` equal parts of a batch fits the devices.

    path: the setting that says how many `rows` there are.
    """
    cut = row_devices(mesh)
    unit = cut * parts
    rule = f"must be a multiple of {unit}: {cut} devices (mesh axes {RULES['batch']}) hold as many"
    rule += f" rows of each of {parts} micro-batches" if parts > 1 else " rows each"
    check(rows % unit == 0, path, rows, rule, f"Try {-(-rows // unit) * unit}")


def check_length(mesh: Mesh, length: int) -> None:
    """Raises `ValueError` unless the devices of a row can each hold a part of its `length`."""
    cut = int(np.prod([mesh.shape[axis] for axis in RULES["length"]]))
    rule = (
        f"must be a multiple of {cut}, the devices (mesh axes {RULES['length']}) that share a row"
    )
    check(length % cut == 0, "length", length, rule, f"Try {-(-length // cut) * cut}")


def spec_of(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes. Raises `ValueError` on an unknown one."""
    for axis in axes:
        if axis not in RULES:
            fail("axis", axis, f"sharding.RULES knows {sorted(RULES)}", "Add it to the table")
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def param_specs(axes: Params) -> Params:
    """The partition of every parameter, from the tree of its logical axes."""
    return jax.tree.map(spec_of, axes, is_leaf=lambda names: isinstance(names, tuple))


def param_shardings(mesh: Mesh, axes: Params, shapes: Params) -> Params:
    """A sharding for every parameter, from its logical axes and its shape.

    Raises:
        ValueError: a size is not a multiple of the devices that cut it.
    """

    def sharding(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        for name, size in zip(names, shape.shape, strict=True):
            parts = int(np.prod([mesh.shape[axis] for axis in RULES.get(name, ())]))
            rule = f"axis {name!r} of {where} is cut over {parts} devices ({RULES.get(name)})"
            check(size % parts == 0, name, size, rule, "Use a mesh that divides it")
        return NamedSharding(mesh, spec_of(names))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def state_shardings(mesh: Mesh, abstract: Any, params: Params) -> Any:
    """Shardings of a state: moments lie as their parameters do, scalars are everywhere.

    abstract: any tree that repeats the parameter tree inside; params: `param_shardings`.
    """
    structure = jax.tree.structure(params)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: params if is_params(node) else everywhere, abstract, is_leaf=is_params
    )


def platform() -> str:
    """What the computation is for: `cpu`, `tpu`, `cuda` or `rocm`.

    The devices of the mesh (`jax.set_mesh`) count, which may be a topology that is not here; else
    this process's own.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = get_backend().platform if device is None else device.platform
    if name != "gpu":
        return name
    return "rocm" if "rocm" in get_backend().platform_version.lower() else "cuda"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel devices, positions whole."""
    return NamedSharding(mesh, spec_of(("batch",)))
