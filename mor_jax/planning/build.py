"""From a configuration and a topology to the figures of a plan."""

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
from mor_jax.planning.aot import CompiledProgram, OutOfMemory, Topology
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

# Scopes that the step gives its exchanges of parameters -> the class of parameters.
SCOPES = {
    "gather_shared": "shared block",
    "scatter_shared": "shared block",
    "gather": "other parameters",
    "scatter": "other parameters",
}
_SIZES = {"bfloat16": 2, "float32": 4}


def make_plan(
    cfg: TrainConfig, topology: Topology, budget: float | int | None = None
) -> Plan | TooLarge:
    """Compiles the step and counts; a program that does not fit is an answer, not an error.

    budget: tokens of the whole run, the configuration's if None.

    Raises:
        ValueError: the mesh does not match the topology, a size does not divide, or the budget is
            no number of tokens.
    """
    ok = budget is None or 0 < budget < math.inf
    check(ok, "tokens", budget, "must be a positive number of tokens", "Try 1e9, or leave it out")
    start = time.perf_counter()
    cfg = resolve_settings(cfg, topology.platform)
    mesh = aot.mesh_of(cfg, topology)
    try:
        program = aot.compile_step(cfg, mesh)
    except OutOfMemory as error:
        return too_large(cfg, topology, mesh, error, time.perf_counter() - start)
    module = parse_module(program.text)
    network = Network(_numbered(topology), topology.slice_size, topology.slices)
    tallied = _stand_in(cfg, topology, tally(module, network))
    moved = traffic(module) if topology.platform == "tpu" else None
    memory = _memory(cfg, topology, mesh, program)
    tokens = cfg.batch_size * cfg.seq_len
    report = flops(cfg.model, cfg.seq_len)
    model = report.training() * tokens / topology.devices
    hardware = report.hardware() * tokens / topology.devices
    times = _times(topology, hardware, moved, tallied)
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
        exchanges=_exchanges(tallied),
        gathered=_gathered(cfg, mesh, tallied),
        model_flops=model,
        hardware_flops=hardware,
        memory_traffic=None if moved is None else moved.bytes,
        times=times,
        mfu=model / (topology.chip.peak * times.step),
        tokens=tokens,
        budget=tokens * cfg.steps if budget is None else budget,
        seconds=time.perf_counter() - start,
        notes=_notes(cfg, topology, tallied, moved),
    )


def variant(cfg: TrainConfig) -> str:
    """plain, recursive or mor."""
    if cfg.model.router.kind != "none":
        return "mor"
    return "plain" if cfg.model.sharing == "none" else "recursive"


def settings(cfg: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """What the figures of a plan depend on beside mesh and topology."""
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
    """The answer for a program that does not fit."""
    parameters, optimizer, batch = _by_shapes(cfg, mesh)
    dtype = _SIZES[cfg.model.dtype]
    rows = cfg.batch_size // cfg.grad_accum_steps // _row_parts(mesh)
    vocabulary = cfg.model.vocab_size // mesh.shape["tensor"]
    parts = {
        "optimiser state": optimizer,
        "parameters": parameters,
        "gradients, float32": parameters,
        "batch": batch,
        "activations kept for the backward pass (accounting)": _activations(cfg, mesh),
        "logits of one chunk, float32 (accounting)": 4
        * rows
        * (cfg.loss_chunk_size or cfg.seq_len)
        * vocabulary,
        "one table gathered (accounting)": dtype * vocabulary * cfg.model.hidden_size,
    }
    if cfg.model.sharing != "none" and settings(cfg, mesh)["gather_shared"] == "once":
        shared = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_split(cfg)[0]))
        parts["shared block gathered (accounting)"] = dtype * shared // mesh.shape["tensor"]
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


def _by_shapes(cfg: TrainConfig, mesh: Mesh) -> tuple[int, int, int]:
    """Bytes of parameters, optimiser state and batch on one device."""
    state, batch = aot.abstract(cfg, mesh)

    def held(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in leaves
        )

    return held(state.params), held(state.opt_state), held(batch)


def _row_parts(mesh: Mesh) -> int:
    return mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]


def _activations(cfg: TrainConfig, mesh: Mesh) -> int:
    """Bytes that one micro-batch keeps on one device for its backward pass, by accounting."""
    rows = cfg.batch_size / cfg.grad_accum_steps / _row_parts(mesh)
    return int(activation_bytes(cfg.model, cfg.seq_len) * rows * cfg.seq_len)


def _memory(
    cfg: TrainConfig, topology: Topology, mesh: Mesh, program: CompiledProgram
) -> MemoryUse:
    stats = program.compiled.memory_analysis()
    parameters, optimizer, batch = _by_shapes(cfg, mesh)
    here = topology.platform == "tpu"
    # Outputs that take no argument's place stand beside the arguments.
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    logits = 4 * cfg.model.vocab_size // mesh.shape["tensor"] * (cfg.loss_chunk_size or cfg.seq_len)
    rows = cfg.batch_size // cfg.grad_accum_steps // _row_parts(mesh)
    return MemoryUse(
        parameters=parameters,
        optimizer=optimizer,
        batch=batch,
        arguments=stats.argument_size_in_bytes if here else parameters + optimizer + batch,
        temporaries=stats.temp_size_in_bytes + fresh if here else None,
        program=stats.generated_code_size_in_bytes if here else 0,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes if here else 0,
        available=topology.chip.memory,
        # Gradients are float32 sums, one for each parameter.
        estimate=_activations(cfg, mesh) + parameters + 2 * rows * logits,
        largest=program.largest,
    )


def _numbered(topology: Topology) -> int:
    """Devices that one program numbers: a TPU slice has its own, fake devices are all in one."""
    return topology.slice_size if topology.platform == "tpu" else topology.devices


def _stand_in(cfg: TrainConfig, topology: Topology, found: Tally) -> Tally:
    """`found` as GPUs exchange parameters: in 16 bits, which the compiler for CPUs widens to 32."""
    if topology.platform == "tpu" or cfg.model.dtype == "float32":
        return found
    runs: dict[Collective, int] = {}
    for one, count in found.runs.items():
        if _scope(one) and one.operand.startswith("f32"):
            one = dataclasses.replace(one, inside=one.inside / 2, between=one.between / 2)
        runs[one] = runs.get(one, 0) + count
    return Tally(runs, found.unknown_loops)


def _scope(one: Collective) -> str:
    """The scope in which the step wrote the exchange; empty if it names none."""
    found = re.findall(rf"[/(]({'|'.join(SCOPES)})\)*/", one.op_name)
    return found[-1] if found else ""


def _what(one: Collective) -> str:
    scope = _scope(one)
    if not scope:
        return "all else" if one.op_name else "not named"
    return SCOPES[scope] + (", gradients" if scope.startswith("scatter") else "")


def _exchanges(found: Tally) -> tuple[CollectiveCost, ...]:
    rows = []
    for key, part in found.grouped(lambda one: f"{one.kind}|{_what(one)}").items():
        kind, what = key.split("|")
        rows.append(
            CollectiveCost(
                kind=kind, what=what, count=part.count, inside=part.inside, between=part.between
            )
        )
    return tuple(rows)


def _split(cfg: TrainConfig) -> tuple[Any, Any]:
    """Shapes of the parameters that fsdp cuts: those of the shared block, and the others."""
    shapes, axes = abstract_params(cfg.model), logical_axes(cfg.model)

    def cut(tree: Any, names: Any) -> list[Any]:
        leaves = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple))
        pairs = zip(jax.tree.leaves(tree), leaves, strict=True)
        return [leaf for leaf, name in pairs if "embed" in name]

    shared = {key: value for key, value in shapes.items() if key == "shared"}
    rest = {key: value for key, value in shapes.items() if key != "shared"}
    return (
        cut(shared, {key: axes[key] for key in shared}),
        cut(rest, {key: axes[key] for key in rest}),
    )


def _gathered(cfg: TrainConfig, mesh: Mesh, found: Tally) -> tuple[AllGatherCost, ...]:
    """Times that each class of parameters is gathered, from the bytes of its all-gathers.

    Nothing where the program does not say what its exchanges are for.
    """
    if not any(_scope(one) for one in found.runs):
        return ()
    parts = mesh.shape["fsdp"]
    rows = []
    for what, leaves in zip(("shared block", "other parameters"), _split(cfg), strict=True):
        values = sum(math.prod(leaf.shape) for leaf in leaves) / mesh.shape["tensor"]
        once = values * _SIZES[cfg.model.dtype] * (parts - 1) / parts
        if not once:
            continue
        times = {"forward": 0.0, "backward": 0.0}
        for one, runs in found.runs.items():
            if _scope(one).startswith("gather") and _what(one) == what:
                way = "backward" if "transpose(" in one.op_name else "forward"
                times[way] += one.bytes * runs / once
        rows.append(AllGatherCost(what=what, **times))
    return tuple(rows)


def _times(topology: Topology, hardware: float, moved: Traffic | None, found: Tally) -> StepTimes:
    chip = topology.chip
    links, outside = chip.interconnect, chip.data_centre
    between = found.between / outside if outside else None
    return StepTimes(
        matrix=hardware / chip.peak,
        memory=None if moved is None else moved.bytes / chip.bandwidth,
        # What is published counts both directions; a chip receives over one of them.
        inside=found.inside / (links / 2) if links else None,
        between=between if topology.slices > 1 else 0.0,
    )


def _notes(
    cfg: TrainConfig, topology: Topology, found: Tally, moved: Traffic | None
) -> tuple[str, ...]:
    notes = []
    if topology.platform == "gpu":
        notes.append(
            "No compiler for GPUs is here. Parameters, optimiser, arguments and exchanges are those"
            " of the step cut over fake CPU devices, with parameters and their gradients exchanged"
            " in the compute dtype. Temporaries and memory traffic are not known; in the place of"
            " temporaries stands what our accounting says about activations, gradients and logits."
        )
    if found.runs and not any(_scope(one) for one in found.runs):
        notes.append(
            "The compiler drops names from programs for several slices, so which exchange carries"
            " what is not told apart."
        )
    if cfg.model.dtype == "float32":
        notes.append("The chip's peak is for bfloat16; float32 runs several times slower.")
    unknown = [*found.unknown_loops, *(moved.unknown_loops if moved else ())]
    if unknown:
        names = ", ".join(sorted(set(unknown)))
        notes.append(f"Loops whose length is not known count as one turn: {names}.")
    if topology.slices > 1 and topology.chip.data_centre is None and found.between:
        notes.append(f"No data-centre bandwidth is published for {topology.kind}.")
    return tuple(notes)
