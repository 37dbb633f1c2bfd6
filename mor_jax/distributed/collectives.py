"""Exchanges between devices: the step cut over rows by hand, and what its parts have to send.

A training step moves three things: parts of parameters to whoever computes with them, gradients
back to whoever keeps the parts, and sums. They are written out here instead of being left to the
compiler, so that each is moved as often as the code says and rows of a batch never meet.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from mor_jax.distributed.mesh import AXES, RULES, platform
from mor_jax.runtime.hardware import CHIPS
from mor_jax.types import Array, Params

ONE_ROUND = 8
"""Devices up to which the TPU compiler gathers and scatters as it is told."""


def row_axes() -> tuple[str, ...]:
    """The mesh axes over which `shard_map_over_batch` shards the batch; () outside of it."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in RULES["batch"] if axis in manual)


def free_spec(*names: str | None) -> PartitionSpec:
    """`spec_of` those axes (None: whole) without what `shard_map_over_batch` has cut already."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    cuts = [() if name is None else RULES[name] for name in names]
    return PartitionSpec(*(tuple(a for a in cut if a not in manual) or None for cut in cuts))


def constrain(x: Array, length: bool) -> Array:
    """`x` [b l d] as layers hand it on; where `length`, cut along it over the `tensor` axis.

    Between layers nothing but the residual stream is kept, and no position needs another, so each
    device holds its share. Routed tokens are whole: choosing and gathering them must not exchange
    anything. Without this the compiler may cut activations as the parameters that they meet are
    cut. Outside of `shard_map_over_batch`, or with one such device, `x` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not row_axes() or "tensor" in mesh.manual_axes:
        return x
    spec = PartitionSpec(None, RULES["length"]) if length else PartitionSpec()
    return jax.lax.with_sharding_constraint(x, spec)


def psum_batch(tree: Any) -> Any:
    """Sums over all devices' rows; the argument itself outside of `shard_map_over_batch`."""
    axes = row_axes()
    return jax.lax.psum(tree, axes) if axes else tree


def shard_map_over_batch(run: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> Any:
    """`run` on each device's own rows and parts of the parameters; exchanges are its own affair.

    arguments, results: trees of the arguments' and results' partitions (`PartitionSpec`); of these
    only the axes that cut rows count, `tensor` stays with the compiler. Without a mesh, or where
    nothing is cut, `run` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in RULES["batch"]):
        return run
    # A kernel that the compiler cannot cut must not see an axis that is the compiler's.
    manual = RULES["batch"] if mesh.shape["tensor"] > 1 else AXES
    arguments, results = jax.tree.map(partial(_only, manual), (arguments, results), is_leaf=_spec)
    return jax.shard_map(
        run, in_specs=arguments, out_specs=results, axis_names=set(manual), check_vma=False
    )


def _spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _only(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(tuple(a for a in cut if a in axes) or None for cut in _cuts(spec)))


def _cuts(spec: PartitionSpec) -> list[tuple[str, ...]]:
    # An entry may be None, one mesh axis, or several.
    return [() if cut is None else (cut,) if isinstance(cut, str) else cut for cut in spec]


def all_gather_param(
    x: Array,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    dtype: Any = None,
    label: str = "gather",
) -> Array:
    """A parameter gathered from the devices that hold its parts, in `dtype` where it is cut.

    names, sizes: its logical axes, and how long they are when whole. label: what the exchange is
    called in the compiled program. The gradient comes back summed over those devices, each keeping
    its part. A parameter that is whole stays as it is.
    """
    # Layers of a stack stay in front, since a scan will slice them.
    lead = int(names[0] == "layers")
    for axis, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if x.shape[axis] == size:
            continue
        x = x if dtype is None else x.astype(dtype)
        # As a matrix [parts, rest]: short axes at the end would be padded on their way.
        rows = jnp.moveaxis(x, axis, lead)
        matrix = rows.reshape(*rows.shape[: lead + 1], -1)
        others = [other for other in names[lead:] if other != name]
        for cut in reversed(RULES[name]):
            gather = partial(_gather, axis=lead, name=cut, label=label)
            matrix = _on_own_part(others, lead, gather)(matrix)
        full = matrix.reshape(*matrix.shape[: lead + 1], *rows.shape[lead + 1 :])
        x = jnp.moveaxis(full, lead, axis)
    return x


def _on_own_part(
    others: list[str], lead: int, run: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """`run` on this device's part of [.. parts, rest]; `others`, the rest, is cut over `tensor`.

    Left to the compiler, an exchange over other axes would gather `tensor` as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = set(RULES[others[0]] if others else ()) - set(mesh.manual_axes)
    if not left:
        return run
    spec = PartitionSpec(*[None] * (lead + 1), tuple(left))
    return jax.shard_map(run, in_specs=spec, out_specs=spec, axis_names=left, check_vma=False)


def fits_gathered(values: int, accumulates: bool) -> bool:
    """Whether parameters that are gathered for a whole step leave three quarters of the memory.

    values: how many. Each takes a 16-bit copy, the gradient of one pass, and the sum of gradients,
    of 32 bits where it goes over micro-batches (`accumulates`). True on devices whose memory is not
    known here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if mesh.empty or device is None:
        return True
    chip = CHIPS.get(device.device_kind)
    size = values * (8 if accumulates else 6) / mesh.shape["tensor"]
    return chip is None or size <= chip.memory / 4


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: Array, axis: int, name: str, label: str) -> Array:
    with jax.named_scope(label):
        grid = _grid(name)
        if grid is None:
            return jax.lax.all_gather(x, name, axis=axis, tiled=True)
        parts = x
        for groups in (grid, grid.T):
            parts = jax.lax.all_gather(parts, name, axis_index_groups=groups.tolist())
        parts = jnp.moveaxis(parts, (0, 1), (axis, axis + 1))
        return parts.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _gather_fwd(x: Array, axis: int, name: str, label: str) -> tuple[Array, None]:
    return _gather(x, axis, name, label), None


def _gather_bwd(axis: int, name: str, label: str, _: None, grad: Array) -> tuple[Array]:
    # XLA's CPU compiler cannot sum 16-bit numbers over devices beside an axis of its own.
    wide = grad.astype(jnp.float32) if platform() == "cpu" else grad
    with jax.named_scope(label.replace("gather", "scatter")):
        return (_scatter(wide, axis, name).astype(grad.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _grid(name: str) -> np.ndarray | None:
    """Devices of a mesh axis in rows of neighbours, for exchanges in two rounds; None: in one.

    Two rounds, one along the rows and one along the columns, move as much as one. The TPU compiler
    turns one over a whole slice into a sum of whole arrays, which moves twice as much.
    """
    devices = jax.lax.axis_size(name)
    near = 2 ** (devices.bit_length() // 2)
    if platform() != "tpu" or devices <= ONE_ROUND or devices % near:
        return None
    return np.arange(devices).reshape(-1, near)


def _scatter(x: Array, axis: int, name: str) -> Array:
    """Sums over the devices of a mesh axis; each keeps its part of array axis `axis`."""
    grid = _grid(name)
    if grid is None:
        return jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    parts = x.reshape(*x.shape[:axis], *grid.shape, -1, *x.shape[axis + 1 :])
    parts = jnp.moveaxis(parts, (axis, axis + 1), (0, 1))
    for groups in (grid.T, grid):
        # Parts that vary fastest in memory would be summed as whole arrays again.
        parts = with_layout_constraint(parts, Layout(major_to_minor=tuple(range(parts.ndim))))
        parts = jax.lax.psum_scatter(parts, name, axis_index_groups=groups.tolist())
    return parts


def psum_replicated_grads(grads: Params, specs: Params) -> Params:
    """Gradients of each device's rows -> of all rows, for parameters with the partitions `specs`.

    Along axes that cut a parameter, `whole` has summed already.
    """

    def total(grad: Array, spec: PartitionSpec) -> Array:
        cut = set().union(*_cuts(spec))
        return jax.lax.psum(grad, tuple(axis for axis in row_axes() if axis not in cut))

    with jax.named_scope("psum_replicated_grads"):
        return jax.tree.map(total, grads, specs) if row_axes() else grads
