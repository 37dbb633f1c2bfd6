"""Other settings for a run that does not fit: which, in which order, and whether they do."""

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


def changed(cfg: TrainConfig, change: Change) -> TrainConfig:
    """`cfg` with other values; validated. Raises ValueError on a value that does not fit."""
    values = cfg.to_dict()
    for path, value in change.items():
        *groups, name = path.split(".")
        node = values
        for group in groups:
            node = node[group]
        node[name] = value
    return TrainConfig.from_dict(values)


def candidates(cfg: TrainConfig, mesh: Mesh, state_fits: bool) -> Iterator[Change]:
    """Changes from the gentlest to the one that saves most; each at most once.

    state_fits: whether parameters and optimiser alone fit; if not, only the mesh can help.
    """
    mesh_only = _meshes(cfg, mesh)
    if not state_fits:
        yield from mesh_only
        return
    more, most = _more_parts(cfg, mesh)
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


def _more_parts(cfg: TrainConfig, mesh: Mesh) -> tuple[Change, Change]:
    """Twice as many micro-batches, and as many as there are rows for; {} where there is no room."""
    cut = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
    rows = cfg.batch_size // cut
    fit = [n for n in range(cfg.grad_accum_steps + 1, rows + 1) if rows % n == 0]
    doubled = [n for n in fit if n >= 2 * cfg.grad_accum_steps]
    return (
        {"grad_accum_steps": doubled[0]} if doubled else {},
        {"grad_accum_steps": fit[-1]} if fit else {},
    )


def _meshes(cfg: TrainConfig, mesh: Mesh) -> list[Change]:
    """Meshes that cut parameters into more parts: by fsdp, then also by tensor."""
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    names = ("mesh.data", "mesh.fsdp", "mesh.tensor")
    found = [(1, data * fsdp, tensor)] if data > 1 else []
    for times in (2, 4, 8):
        if (data * fsdp) % times == 0 and cfg.model.num_kv_heads % (tensor * times) == 0:
            found.append((1, data * fsdp // times, tensor * times))
    return [dict(zip(names, sizes, strict=True)) for sizes in found]


def try_others(
    cfg: TrainConfig,
    topology: Topology,
    answer: TooLarge,
    limit: float | int,
    report: Callable[[Change, int | None], None] = lambda change, short: None,
) -> TooLarge:
    """`answer` with the settings tried, until some fit or `limit` seconds are over.

    report: is told each change and the bytes that it is short of, None if it fits.
    """
    start, attempts, left = time.perf_counter(), [], False
    cfg = resolve_settings(cfg, topology.platform)
    mesh = aot.mesh_of(cfg, topology)
    held = dict(answer.parts)
    state = held["parameters"] + held["optimiser state"]
    for change in candidates(cfg, mesh, state < answer.available):
        if time.perf_counter() - start > limit:
            left = True
            break
        one = _attempt(cfg, topology, change)
        if one is None:
            continue
        attempts.append(one)
        report(change, one.short)
        if one.short is None:
            break
    seconds = answer.seconds + time.perf_counter() - start
    return dataclasses.replace(answer, attempts=tuple(attempts), out_of_time=left, seconds=seconds)


def _attempt(cfg: TrainConfig, topology: Topology, change: Change) -> Attempt | None:
    """Compiles with `change`; None if the change is no valid configuration."""
    start = time.perf_counter()
    try:
        other = changed(cfg, change)
        mesh = aot.mesh_of(other, topology)
        aot.abstract(other, mesh)
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
