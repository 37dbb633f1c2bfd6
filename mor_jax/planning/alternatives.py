"""Searches for settings with which a run that is too large fits into memory."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from mor_jax.config import TrainConfig
from mor_jax.planning import aot
from mor_jax.planning.aot import OutOfMemory, Topology
from mor_jax.planning.report import Attempt, TooLarge
from mor_jax.training.resolved_settings import resolve_settings

Change = dict[str, Any]
"""Dotted setting -> value."""

_REMAT = ("none", "block", "full", "offload")


def with_changes(cfg: TrainConfig, change: Change) -> TrainConfig:
    """`cfg` with `change` applied, validated. Raises ValueError on an invalid value."""
    values = cfg.to_dict()
    for path, value in change.items():
        *groups, name = path.split(".")
        node = values
        for group in groups:
            node = node[group]
        node[name] = value
    return TrainConfig.from_dict(values)


def candidates(cfg: TrainConfig, mesh: Mesh, state_fits: bool) -> Iterator[Change]:
    """Distinct changes, from the one that costs least speed to the one that saves most memory.

    state_fits: whether parameters and optimiser state alone fit; if not, only the mesh can help.
    """
    mesh_only = _meshes(cfg, mesh)
    if not state_fits:
        yield from mesh_only
        return
    more, most = _more_accumulation(cfg, mesh)
    levels = _REMAT[_REMAT.index(cfg.model.remat) + 1 : 3]
    less = {}
    if cfg.model.sharing != "none" and cfg.sharding.all_gather_shared != "per_recursion":
        less = {"sharding.all_gather_shared": "per_recursion"}
    seen: list[Change] = []
    for change in (
        *({"model.remat": level} for level in levels[:1]),
        more,
        less,
        *({"model.remat": level} for level in levels[1:]),
        *mesh_only[:1],
        *({"model.remat": level} | more for level in levels[-1:]),
        *({"model.remat": level} | most for level in levels[-1:]),
        most,
        *({"model.remat": level} | most | less for level in levels[-1:]),
        most | less | {"model.remat": "full"} | (mesh_only[0] if mesh_only else {}),
        most | less | {"model.remat": "offload"},
    ):
        if change and change not in seen:
            seen.append(change)
            yield change


def _more_accumulation(cfg: TrainConfig, mesh: Mesh) -> tuple[Change, Change]:
    """Twice as many micro-batches, and as many as the batch allows; {} if neither is possible."""
    shards = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
    sequences = cfg.batch_size // shards
    valid = [n for n in range(cfg.grad_accum_steps + 1, sequences + 1) if sequences % n == 0]
    doubled = [n for n in valid if n >= 2 * cfg.grad_accum_steps]
    return (
        {"grad_accum_steps": doubled[0]} if doubled else {},
        {"grad_accum_steps": valid[-1]} if valid else {},
    )


def _meshes(cfg: TrainConfig, mesh: Mesh) -> list[Change]:
    """Meshes that shard parameters further: by fsdp first, then also by tensor."""
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    names = ("mesh.data", "mesh.fsdp", "mesh.tensor")
    meshes = [(1, data * fsdp, tensor)] if data > 1 else []
    for times in (2, 4, 8):
        if (data * fsdp) % times == 0 and cfg.model.num_kv_heads % (tensor * times) == 0:
            meshes.append((1, data * fsdp // times, tensor * times))
    return [dict(zip(names, sizes, strict=True)) for sizes in meshes]


def try_alternatives(
    cfg: TrainConfig,
    topology: Topology,
    result: TooLarge,
    limit: float | int,
    on_attempt: Callable[[Change, int | None], None] = lambda change, short: None,
) -> TooLarge:
    """`result` with the settings tried, until one fits or `limit` seconds have passed.

    on_attempt: called with each change and the bytes it is short of, None if it fits.
    """
    start, attempts, out_of_time = time.perf_counter(), [], False
    cfg = resolve_settings(cfg, topology.platform)
    mesh = aot.mesh_of(cfg, topology)
    parts = dict(result.parts)
    state = parts["parameters"] + parts["optimiser state"]
    for change in candidates(cfg, mesh, state < result.available):
        if time.perf_counter() - start > limit:
            out_of_time = True
            break
        one = _attempt(cfg, topology, change)
        if one is None:
            continue
        attempts.append(one)
        on_attempt(change, one.short)
        if one.short is None:
            break
    seconds = result.seconds + time.perf_counter() - start
    return dataclasses.replace(
        result, attempts=tuple(attempts), out_of_time=out_of_time, seconds=seconds
    )


def _attempt(cfg: TrainConfig, topology: Topology, change: Change) -> Attempt | None:
    """Compiles with `change`; None if the changed configuration is invalid."""
    start = time.perf_counter()
    try:
        other = with_changes(cfg, change)
        mesh = aot.mesh_of(other, topology)
        aot.abstract_inputs(other, mesh)
    except ValueError:
        return None
    try:
        stats = aot.compile_step(other, mesh).compiled.memory_analysis()
    except OutOfMemory as error:
        short = error.needed - error.available
        return Attempt(settings=change, short=short, seconds=time.perf_counter() - start)
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.generated_code_size_in_bytes
    return Attempt(settings=change, short=None, seconds=time.perf_counter() - start, total=total)
