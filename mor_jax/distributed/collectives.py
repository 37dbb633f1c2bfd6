"""Explicit collectives of the training step, which is a `shard_map` over the batch.

A training step communicates three things: all-gathers of parameter shards, reduce-scatters of
their gradients, and sums. They are explicit instead of being inserted by the compiler, so that each
runs exactly as often as the code says and sequences of a batch are never exchanged.
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
"""Devices up to which the TPU compiler keeps an all-gather or reduce-scatter as written."""


def batch_axes() -> tuple[str, ...]:
    """The mesh axes over which `shard_map_over_batch` shards the batch; () outside of it."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in RULES["batch"] if axis in manual)


def free_spec(*names: str | None) -> PartitionSpec:
    """`spec_of` those axes (None: replicated) without the axes that `shard_map` handles."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    entries = [() if name is None else RULES[name] for name in names]
    return PartitionSpec(*(tuple(a for a in axes if a not in manual) or None for axes in entries))


def constrain(x: Array, length: bool) -> Array:
    """Constrains the sharding of the residual stream `x` [b l d] between layers.

    length: shard the sequence over the `tensor` axis (sequence parallelism): between layers no
    position needs another. Routed tokens are replicated, so that selecting and gathering them needs
    no communication. Without this constraint the compiler may shard activations as the parameters
    are. Returns `x` unchanged outside of `shard_map_over_batch` or with one such device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not batch_axes() or "tensor" in mesh.manual_axes:
        return x
    spec = PartitionSpec(None, RULES["length"]) if length else PartitionSpec()
    return jax.lax.with_sharding_constraint(x, spec)


def psum_batch(tree: Any) -> Any:
    """Sums over the shards of the batch; the identity outside of `shard_map_over_batch`."""
    axes = batch_axes()
    return jax.lax.psum(tree, axes) if axes else tree


def shard_map_over_batch(run: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> Any:
    """`run` on each device's shard of batch and parameters; `run` does its own communication.

    arguments, results: trees of the `PartitionSpec`s of arguments and results. Only the axes that
    shard the batch are manual; `tensor` is left to the compiler. Returns `run` itself without a
    mesh or if nothing is sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in RULES["batch"]):
        return run
    # A kernel that the compiler cannot shard must not see an axis left to the compiler.
    manual = RULES["batch"] if mesh.shape["tensor"] > 1 else AXES
    arguments, results = jax.tree.map(partial(_only, manual), (arguments, results), is_leaf=_spec)
    return jax.shard_map(
        run, in_specs=arguments, out_specs=results, axis_names=set(manual), check_vma=False
    )


def _spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _only(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(tuple(a for a in entry if a in axes) or None for entry in _axes(spec)))


def _axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    # An entry may be None, one mesh axis, or several.
    return [() if e is None else (e,) if isinstance(e, str) else e for e in spec]


def all_gather_param(
    x: Array,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    dtype: Any = None,
    label: str = "gather",
) -> Array:
    """All-gathers a parameter in `dtype`; its gradient is reduce-scattered.

    names, sizes: its logical axes and their full sizes. label: name scope of the collective in the
    compiled program. A parameter that is not sharded is returned unchanged.
    """
    # The layer axis of a stack stays first, since a scan will slice it.
    lead = int(names[0] == "layers")
    for axis, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if x.shape[axis] == size:
            continue
        x = x if dtype is None else x.astype(dtype)
        # As a matrix [shards, rest]: short trailing axes would be padded in transfer.
        rows = jnp.moveaxis(x, axis, lead)
        matrix = rows.reshape(*rows.shape[: lead + 1], -1)
        others = [other for other in names[lead:] if other != name]
        for mesh_axis in reversed(RULES[name]):
            gather = partial(_gather, axis=lead, name=mesh_axis, label=label)
            matrix = _on_tensor_shard(others, lead, gather)(matrix)
        full = matrix.reshape(*matrix.shape[: lead + 1], *rows.shape[lead + 1 :])
        x = jnp.moveaxis(full, lead, axis)
    return x


def _on_tensor_shard(
    others: list[str], lead: int, run: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """`run` on this device's shard of [.. shards, rest]; `tensor` shards `others`, the rest.

    Otherwise the compiler would gather `tensor` too for a collective over another axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = set(RULES[others[0]] if others else ()) - set(mesh.manual_axes)
    if not auto:
        return run
    spec = PartitionSpec(*[None] * (lead + 1), tuple(auto))
    return jax.shard_map(run, in_specs=spec, out_specs=spec, axis_names=auto, check_vma=False)


def fits_gathered(values: int, accumulates: bool) -> bool:
    """Whether parameters gathered for a whole step take at most a quarter of the device's memory.

    values: their number. Each needs a 16-bit copy, the gradient of one pass, and the sum of
    gradients, in 32 bits if it is accumulated over micro-batches (`accumulates`). True on devices
    whose memory size is not listed.
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
    # XLA's CPU compiler cannot reduce 16-bit numbers while another axis is left to it.
    wide = grad.astype(jnp.float32) if platform() == "cpu" else grad
    with jax.named_scope(label.replace("gather", "scatter")):
        return (_scatter(wide, axis, name).astype(grad.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _grid(name: str) -> np.ndarray | None:
    """Devices of a mesh axis as a grid, for collectives in two rounds; None: in one round.

    Two rounds, along the rows and along the columns, transfer as much as one. The TPU compiler
    turns a single collective over a whole slice into an all-reduce, which transfers twice as much.
    """
    devices = jax.lax.axis_size(name)
    columns = 2 ** (devices.bit_length() // 2)
    if platform() != "tpu" or devices <= ONE_ROUND or devices % columns:
        return None
    return np.arange(devices).reshape(-1, columns)


def _scatter(x: Array, axis: int, name: str) -> Array:
    """Reduce-scatter over a mesh axis; each device keeps its shard of array axis `axis`."""
    grid = _grid(name)
    if grid is None:
        return jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    parts = x.reshape(*x.shape[:axis], *grid.shape, -1, *x.shape[axis + 1 :])
    parts = jnp.moveaxis(parts, (axis, axis + 1), (0, 1))
    for groups in (grid.T, grid):
        # Otherwise the compiler may use a layout that turns this into an all-reduce again.
        parts = with_layout_constraint(parts, Layout(major_to_minor=tuple(range(parts.ndim))))
        parts = jax.lax.psum_scatter(parts, name, axis_index_groups=groups.tolist())
    return parts


def psum_replicated_grads(grads: Params, specs: Params) -> Params:
    """Sums the gradients over the batch shards, for parameters with the partitions `specs`.

    Along axes that shard a parameter, `all_gather_param` has already reduced its gradient.
    """

    def total(grad: Array, spec: PartitionSpec) -> Array:
        sharded = set().union(*_axes(spec))
        return jax.lax.psum(grad, tuple(axis for axis in batch_axes() if axis not in sharded))

    with jax.named_scope("psum_replicated_grads"):
        return jax.tree.map(total, grads, specs) if batch_axes() else grads
