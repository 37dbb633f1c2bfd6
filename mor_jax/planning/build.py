"""Computes the figures of a plan from a configuration and a topology."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check
from mor_jax.models.flops import activation_bytes, flops
from mor_jax.models.param_count import unique_parameters
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.planning import aot
from mor_jax.planning.aot import CompiledStep, OutOfMemory, Topology
from mor_jax.planning.hlo.collectives import Collective, Network, Tally, tally
from mor_jax.planning.hlo.memory import Traffic, traffic
from mor_jax.planning.hlo.text import parse_module
from mor_jax.planning.report import (
    AllGatherCost,
    CollectiveCost,
    MemoryUse,
    Plan,
    StepTimes,
    TooLarge,
)
from mor_jax.training.resolved_settings import resolve_settings
from mor_jax.training.train_step import shares_once

# Named scopes of the step's parameter collectives -> which parameters they move.
SCOPES = {
    "gather_shared": "shared block",
    "scatter_shared": "shared block",
    "gather": "other parameters",
    "scatter": "other parameters",
}
_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def make_plan(
    cfg: TrainConfig, topology: Topology, budget: float | int | None = None
) -> Plan | TooLarge:
    """Compiles the step and computes its figures. A step that does not fit is no error: TooLarge.

    budget: tokens of the whole run; None takes the configured steps.

    Raises:
        ValueError: the mesh does not match the topology, a size is not divisible, or the budget is
            not a positive number.
    """
    valid = budget is None or 0 < budget < math.inf
    check(valid, "tokens", budget, "must be a positive number of tokens", "Try 1e9, or omit it")
    start = time.perf_counter()
    cfg = resolve_settings(cfg, topology.platform)
    mesh = aot.mesh_of(cfg, topology)
    try:
        step = aot.compile_step(cfg, mesh)
    except OutOfMemory as error:
        return too_large(cfg, topology, mesh, error, time.perf_counter() - start)
    module = parse_module(step.text)
    network = Network(_program_devices(topology), topology.slice_size, topology.slices)
    collectives = _as_on_gpus(cfg, topology, tally(module, network))
    memory_traffic = traffic(module) if topology.platform == "tpu" else None
    memory = _memory(cfg, topology, mesh, step)
    tokens = cfg.batch_size * cfg.seq_len
    report = flops(cfg.model, cfg.seq_len)
    model = report.training() * tokens / topology.devices
    hardware = report.hardware() * tokens / topology.devices
    times = _times(topology, hardware, memory_traffic, collectives)
    return Plan(
        variant=variant(cfg),
        topology=topology.name,
        chip=topology.kind,
        chips=topology.devices,
        slices=topology.slices,
        mesh=dict(mesh.shape),
        settings=settings(cfg, mesh),
        parameters=unique_parameters(cfg.model),
        memory=memory,
        exchanges=_exchanges(collectives),
        gathered=_gathered(cfg, mesh, collectives),
        model_flops=model,
        hardware_flops=hardware,
        memory_traffic=None if memory_traffic is None else memory_traffic.bytes,
        times=times,
        mfu=model / (topology.chip.peak * times.step),
        tokens=tokens,
        budget=tokens * cfg.steps if budget is None else budget,
        seconds=time.perf_counter() - start,
        notes=_notes(cfg, topology, collectives, memory_traffic),
    )


def variant(cfg: TrainConfig) -> str:
    """`plain` (vanilla), `recursive` or `mor`."""
    if cfg.model.router.kind != "none":
        return "mor"
    return "plain" if cfg.model.sharing == "none" else "recursive"


def settings(cfg: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """The settings that a plan's figures depend on, besides mesh and topology."""
    with jax.set_mesh(mesh):
        once = "once" if shares_once(cfg) else "per_recursion"
    return {
        "batch_size": cfg.batch_size,
        "length": cfg.seq_len,
        "accumulate": cfg.grad_accum_steps,
        "remat": cfg.model.remat,
        "gather_shared": once if cfg.model.sharing != "none" else None,
        "recursions": cfg.model.num_recursions,
        "layers": cfg.model.num_layers,
        "dtype": cfg.model.dtype,
    }


def too_large(
    cfg: TrainConfig, topology: Topology, mesh: Mesh, error: OutOfMemory, seconds: float
) -> TooLarge:
    """The result for a step that does not fit: where its memory goes."""
    parameters, optimizer, batch = _state_bytes(cfg, mesh)
    dtype_bytes = _DTYPE_BYTES[cfg.model.dtype]
    sequences = cfg.batch_size // cfg.grad_accum_steps // _batch_shards(mesh)
    vocabulary = cfg.model.vocab_size // mesh.shape["tensor"]
    parts = {
        "optimiser state": optimizer,
        "parameters": parameters,
        "gradients, float32": parameters,
        "batch": batch,
        "activations saved for the backward pass (estimate)": _activations(cfg, mesh),
        "logits of one chunk, float32 (estimate)": 4
        * sequences
        * (cfg.loss_chunk_size or cfg.seq_len)
        * vocabulary,
        "one embedding table, gathered (estimate)": dtype_bytes
        * vocabulary
        * cfg.model.hidden_size,
    }
    if cfg.model.sharing != "none" and settings(cfg, mesh)["gather_shared"] == "once":
        shared = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_fsdp_params(cfg)[0]))
        gathered = dtype_bytes * shared // mesh.shape["tensor"]
        parts["shared block, gathered (estimate)"] = gathered
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return TooLarge(
        variant=variant(cfg),
        topology=topology.name,
        chips=topology.devices,
        mesh=dict(mesh.shape),
        settings=settings(cfg, mesh),
        needed=error.needed,
        available=error.available,
        parts=tuple(ordered),
        largest=error.largest,
        seconds=seconds,
    )


def _state_bytes(cfg: TrainConfig, mesh: Mesh) -> tuple[int, int, int]:
    """Bytes of parameters, optimiser state and batch on one device, from shapes and shardings."""
    state, batch = aot.abstract_inputs(cfg, mesh)

    def device_bytes(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in leaves
        )

    return device_bytes(state.params), device_bytes(state.opt_state), device_bytes(batch)


def _batch_shards(mesh: Mesh) -> int:
    return mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]


def _activations(cfg: TrainConfig, mesh: Mesh) -> int:
    """Bytes that one micro-batch saves on one device for its backward pass, estimated."""
    sequences = cfg.batch_size / cfg.grad_accum_steps / _batch_shards(mesh)
    return int(activation_bytes(cfg.model, cfg.seq_len) * sequences * cfg.seq_len)


def _memory(cfg: TrainConfig, topology: Topology, mesh: Mesh, step: CompiledStep) -> MemoryUse:
    stats = step.compiled.memory_analysis()
    parameters, optimizer, batch = _state_bytes(cfg, mesh)
    exact = topology.platform == "tpu"  # The chip's own compiler reports the memory.
    # Outputs that reuse no argument's buffer need memory of their own.
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    logits = 4 * cfg.model.vocab_size // mesh.shape["tensor"] * (cfg.loss_chunk_size or cfg.seq_len)
    sequences = cfg.batch_size // cfg.grad_accum_steps // _batch_shards(mesh)
    return MemoryUse(
        parameters=parameters,
        optimizer=optimizer,
        batch=batch,
        arguments=stats.argument_size_in_bytes if exact else parameters + optimizer + batch,
        temporaries=stats.temp_size_in_bytes + outputs if exact else None,
        program=stats.generated_code_size_in_bytes if exact else 0,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes if exact else 0,
        available=topology.chip.memory,
        # Gradients are float32 sums, one for each parameter.
        estimate=_activations(cfg, mesh) + parameters + 2 * sequences * logits,
        largest=step.largest,
    )


def _program_devices(topology: Topology) -> int:
    """Devices that one compiled program addresses: one TPU slice, or all fake devices."""
    return topology.slice_size if topology.platform == "tpu" else topology.devices


def _as_on_gpus(cfg: TrainConfig, topology: Topology, counted: Tally) -> Tally:
    """`counted` with parameters exchanged in 16 bits, which the CPU compiler widens to 32 bits."""
    if topology.platform == "tpu" or cfg.model.dtype == "float32":
        return counted
    runs: dict[Collective, int] = {}
    for one, count in counted.runs.items():
        if _scope(one) and one.operand.startswith("f32"):
            one = dataclasses.replace(one, inside=one.inside / 2, between=one.between / 2)
        runs[one] = runs.get(one, 0) + count
    return Tally(runs, counted.unknown_loops)


def _scope(one: Collective) -> str:
    """The named scope of the collective in the step; empty if it has none."""
    scopes = re.findall(rf"[/(]({'|'.join(SCOPES)})\)*/", one.op_name)
    return scopes[-1] if scopes else ""


def _what(one: Collective) -> str:
    scope = _scope(one)
    if not scope:
        return "all else" if one.op_name else "not named"
    return SCOPES[scope] + (", gradients" if scope.startswith("scatter") else "")


def _exchanges(counted: Tally) -> tuple[CollectiveCost, ...]:
    rows = []
    for key, part in counted.grouped(lambda one: f"{one.kind}|{_what(one)}").items():
        kind, what = key.split("|")
        rows.append(
            CollectiveCost(
                kind=kind, what=what, count=part.count, inside=part.inside, between=part.between
            )
        )
    return tuple(rows)


def _fsdp_params(cfg: TrainConfig) -> tuple[Any, Any]:
    """Shapes of the parameters sharded by fsdp: those of the shared block, and the others."""
    shapes, axes = abstract_params(cfg.model), logical_axes(cfg.model)

    def sharded(tree: Any, names: Any) -> list[Any]:
        leaves = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple))
        pairs = zip(jax.tree.leaves(tree), leaves, strict=True)
        return [leaf for leaf, name in pairs if "embed" in name]

    shared = {key: value for key, value in shapes.items() if key == "shared"}
    rest = {key: value for key, value in shapes.items() if key != "shared"}
    return (
        sharded(shared, {key: axes[key] for key in shared}),
        sharded(rest, {key: axes[key] for key in rest}),
    )


def _gathered(cfg: TrainConfig, mesh: Mesh, counted: Tally) -> tuple[AllGatherCost, ...]:
    """How often each class of parameters is gathered, from the bytes of its all-gathers.

    Empty if the compiled step carries no names of scopes.
    """
    if not any(_scope(one) for one in counted.runs):
        return ()
    parts = mesh.shape["fsdp"]
    rows = []
    for what, leaves in zip(("shared block", "other parameters"), _fsdp_params(cfg), strict=True):
        values = sum(math.prod(leaf.shape) for leaf in leaves) / mesh.shape["tensor"]
        once = values * _DTYPE_BYTES[cfg.model.dtype] * (parts - 1) / parts
        if not once:
            continue
        times = {"forward": 0.0, "backward": 0.0}
        for one, runs in counted.runs.items():
            if _scope(one).startswith("gather") and _what(one) == what:
                direction = "backward" if "transpose(" in one.op_name else "forward"
                times[direction] += one.bytes * runs / once
        rows.append(AllGatherCost(what=what, **times))
    return tuple(rows)


def _times(
    topology: Topology, hardware: float, memory_traffic: Traffic | None, counted: Tally
) -> StepTimes:
    chip = topology.chip
    links, data_centre = chip.interconnect, chip.data_centre
    between = counted.between / data_centre if data_centre else None
    return StepTimes(
        matrix=hardware / chip.peak,
        memory=None if memory_traffic is None else memory_traffic.bytes / chip.bandwidth,
        # Published figures count both directions; a chip receives over one of them.
        inside=counted.inside / (links / 2) if links else None,
        between=between if topology.slices > 1 else 0.0,
    )


def _notes(
    cfg: TrainConfig, topology: Topology, counted: Tally, memory_traffic: Traffic | None
) -> tuple[str, ...]:
    notes = []
    if topology.platform == "gpu":
        notes.append(
            "No compiler for GPUs is available. Parameters, optimiser state, arguments and"
            " exchanges are those of the step sharded over fake CPU devices, with parameters and"
            " their gradients exchanged in the compute dtype. Temporaries and memory traffic are"
            " unknown; an estimate of activations, gradients and logits replaces the temporaries."
        )
    if counted.runs and not any(_scope(one) for one in counted.runs):
        notes.append(
            "The compiler drops the names of scopes from programs for several slices, so the"
            " exchanges are listed by kind only."
        )
    if cfg.model.dtype == "float32":
        notes.append("The chip's peak is for bfloat16; float32 runs several times slower.")
    unknown = [*counted.unknown_loops]
    unknown += memory_traffic.unknown_loops if memory_traffic else ()
    if unknown:
        names = ", ".join(sorted(set(unknown)))
        notes.append(f"Loops of unknown length count as one iteration: {names}.")
    if topology.slices > 1 and topology.chip.data_centre is None and counted.between:
        notes.append(f"No data-centre bandwidth is published for {topology.kind}.")
    return tuple(notes)
