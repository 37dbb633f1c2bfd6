"""Compiles the train step ahead of time, for devices that are not attached.

Topologies use the vendors' notation: `v5e:16x16` is one slice of 256 chips, `2xv5e:16x16` two such
slices joined by the data-centre network, `v5p:4x4x4` a cube of 64 chips, `h100:8x4` four nodes of
eight GPUs. For TPUs the real compiler runs, from the package `libtpu`; it needs no TPU. For GPUs
the step is sharded over as many fake CPU devices instead: that shows what each device stores and
exchanges, but not its temporaries.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check, fail
from mor_jax.distributed import mesh as sharding
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.runtime.hardware import CHIPS, Chip
from mor_jax.training import compiled_step

# Name -> device kind in JAX, dimensions of a slice, JAX devices per chip.
_TPUS: dict[str, tuple[str, int, int]] = {
    "v5e": ("TPU v5 lite", 2, 1),
    "v5p": ("TPU v5", 3, 1),
    "v6e": ("TPU v6 lite", 2, 1),
    "tpu7x": ("TPU7x", 3, 2),
}
_GPUS = {
    "a100-40g": "NVIDIA A100-SXM4-40GB",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_EXAMPLES = "Try v5e:16x16, v5p:4x4x4, v6e:16x16, 2xv5e:16x16 (two slices) or h100:8x4 (4 nodes)"

# libtpu looks for a TPU when it starts. These variables tell it that there is none, and that other
# processes may load the library too, which only matters where chips are shared.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices that a run uses together.

    name: as the user wrote it. kind: JAX's device kind. slices: groups joined only by the
    data-centre network (TPU slices, GPU nodes). slice_size: JAX devices in one slice. slice_name:
    one slice alone, such as v5e:16x16.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    kind: str
    slices: int
    slice_size: int
    slice_name: str

    @property
    def devices(self) -> int:
        """Devices in all slices together."""
        return self.slices * self.slice_size

    @property
    def chip(self) -> Chip:
        """The chip's published figures."""
        return CHIPS[self.kind]


class OutOfMemory(Exception):
    """The compiled step does not fit into a device's memory.

    needed, available: bytes per device. largest: bytes and description of the largest allocations,
    if the compiler lists them.
    """

    def __init__(self, needed: int, available: int, largest: tuple[tuple[int, str], ...]):
        super().__init__(f"needs {needed} bytes of {available}")
        self.needed, self.available, self.largest = needed, available, largest


def parse_topology(name: str) -> Topology:
    """`2xv5e:16x16` -> two slices of 256 chips. Raises ValueError on an unknown name or shape."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*(?:-\w+)?):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None:
        fail("topology", name, "is not NAME:SHAPE", _EXAMPLES)
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    check(slices > 0, "topology", name, "needs at least one slice", _EXAMPLES)
    known = (*_TPUS, *_GPUS)
    if kind not in known:
        nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
        rule = f"unknown device {kind!r}; known are {', '.join(known)}"
        fail("topology", name, rule, f"Did you mean {nearest}:{shape}?")
    sizes = [int(size) for size in shape.split("x")]
    if kind in _GPUS:
        return _gpu_topology(name, kind, slices, sizes)
    device, dimensions, cores = _TPUS[kind]
    shapes = _slice_shapes(dimensions, max(sizes))
    if shape not in shapes:
        nearest = min(shapes, key=lambda other: _size_distance(other, sizes))
        rule = f"{kind} slices have {dimensions} dimensions, such as {', '.join(shapes[-4:])}"
        fail("topology", name, rule, f"The nearest is {kind}:{nearest}")
    return Topology(name, "tpu", device, slices, math.prod(sizes) * cores, f"{kind}:{shape}")


def _gpu_topology(name: str, kind: str, slices: int, sizes: list[int]) -> Topology:
    valid = len(sizes) <= 2 and slices == 1 and 1 <= sizes[0] <= 8
    rule = "GPUs are written NAME:GPUS_PER_NODExNODES, with at most 8 GPUs per node"
    check(valid, "topology", name, rule, f"Try {kind}:8x4, four nodes of eight")
    nodes = sizes[1] if len(sizes) == 2 else 1
    return Topology(name, "gpu", _GPUS[kind], nodes, sizes[0], f"{kind}:{sizes[0]}")


def _slice_shapes(dimensions: int, largest: int) -> list[str]:
    if dimensions == 2:
        return list(_SHAPES_2D)
    sides = range(4, min(max(largest, 8), 24) + 4, 4)
    cubes = itertools.combinations_with_replacement(sides, 3)
    return [*_SMALL_SHAPES_3D, *("x".join(map(str, cube)) for cube in cubes)]


def _size_distance(shape: str, sizes: list[int]) -> float:
    return abs(math.log(math.prod(int(n) for n in shape.split("x")) / max(math.prod(sizes), 1)))


def devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices in slice order. Code can be compiled for them, not run on them.

    Raises:
        ValueError: libtpu is not installed, or JAX is already running with too few CPU devices.
    """
    if topology.platform == "gpu":
        return _fake_cpu_devices(topology)
    fix = "Run pip install -c requirements.lock -r requirements-tpu.txt; no TPU is needed"
    library = importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")
    rule = "the TPU compiler is in the package libtpu, which is not installed"
    check(bool(library), "topology", topology.name, rule, fix)
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        description = topologies.get_topology_desc(topology.slice_name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        fail("topology", topology.name, f"libtpu rejects it: {error}", _EXAMPLES)
    return sorted(description.devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.id))


def _fake_cpu_devices(topology: Topology) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX is already running; it may have enough devices.
        if jax.config.jax_num_cpu_devices < topology.devices:
            jax.config.update("jax_num_cpu_devices", topology.devices)
    cpus = jax.devices("cpu")
    rule = f"needs {topology.devices} fake CPU devices, but JAX is running with {len(cpus)}"
    fix = "Plan for GPUs in a separate process, as mor plan does"
    check(len(cpus) >= topology.devices, "topology", topology.name, rule, fix)
    return cpus[: topology.devices]


def mesh_of(cfg: TrainConfig, topology: Topology) -> Mesh:
    """The configured mesh over the topology's devices. Raises ValueError if they do not match."""
    mesh = sharding.make_mesh(cfg.mesh, devices(topology))
    sharding.check_batch_size(mesh, "batch_size", cfg.batch_size, cfg.grad_accum_steps)
    return mesh


def abstract_inputs(cfg: TrainConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the train state and of one batch, as in training."""
    shapes = abstract_params(cfg.model)
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), shapes)
    return compiled_step.abstract_state(cfg, mesh, placement), compiled_step.abstract_batch(
        cfg, mesh
    )


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step.

    text: its optimised HLO. largest: bytes and types of its temporaries, largest first, one entry
    per set of types that share a buffer; empty if the compiler does not report them.
    """

    compiled: jax.stages.Compiled
    text: str
    largest: tuple[tuple[int, str], ...] = ()


def compile_step(cfg: TrainConfig, mesh: Mesh) -> CompiledStep:
    """Compiles the train step with the final capacities, those after any capacity warm-up.

    Raises:
        OutOfMemory: the step does not fit into a device's memory.
    """
    state, batch = abstract_inputs(cfg, mesh)
    step = compiled_step.jitted_steps(cfg)(capacity_tokens(cfg.model, cfg.seq_len))
    tpu = mesh.devices.flat[0].platform == "tpu"
    try:
        with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            # Read libtpu's own dump: libtpu may be newer than the HLO reader that ships with JAX.
            options = {"xla_dump_to": folder} if tpu else None
            compiled = step.lower(state, batch).compile(options)
            return _read_dump(compiled, Path(folder))
    except jax.errors.JaxRuntimeError as error:
        if (oom := parse_out_of_memory(str(error))) is None:
            raise
        raise oom from error


def _read_dump(compiled: jax.stages.Compiled, folder: Path) -> CompiledStep:
    texts = sorted(folder.glob("*.after_optimizations.txt"))
    reports = sorted(folder.glob("*.after_optimizations-memory-usage-report.txt"))
    text = texts[-1].read_text() if texts else compiled.as_text()
    largest = tuple(largest_temporaries(reports[-1].read_text())) if reports else ()
    return CompiledStep(compiled, text or "", largest)


_BUFFER = re.compile(r"^[^;]*;\s*([\d.]+)([KMGT]?)i?B;[^;]*;[^;]*;\s*(.*)$", re.MULTILINE)


def largest_temporaries(report: str, limit: int = 8) -> list[tuple[int, str]]:
    """Bytes and types of the largest buffers in main memory, from the compiler's memory report.

    Buffers of equal size and types are merged into one entry: `2 x bf16[4,2048,960]`.
    """
    main = re.split(r"^Memory Space: ", report, flags=re.MULTILINE)[1:2]
    counts: dict[tuple[int, str], int] = {}
    for number, unit, types in _BUFFER.findall("".join(main)):
        buffer = (_bytes(number, unit), types)
        counts[buffer] = counts.get(buffer, 0) + 1
    merged = [(size * count, f"{count} x {types}") for (size, types), count in counts.items()]
    return sorted(merged, reverse=True)[:limit]


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)i?B?"
_OUT_OF_MEMORY = (
    rf"memory required[^(]*\({_SIZE}\) exceeds available \w+ \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"requires? {_SIZE}.*?(?:available|limit|capacity)\D*{_SIZE}",
)


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """The error in a compiler message about memory; None if the message is about another fault."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    matches = (re.search(pattern, message, re.DOTALL) for pattern in _OUT_OF_MEMORY)
    match = next((m for m in matches if m), None)
    if match is None:
        return None
    needed, available = _bytes(match[1], match[2]), _bytes(match[3], match[4])
    return OutOfMemory(needed, available, tuple(_allocations(message)))


def _allocations(message: str) -> Iterator[tuple[int, str]]:
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(_SIZE, entry)
        shape = re.search(r"Shape: (\S+)", entry)
        origin = re.search(r'op_name="([^"]*)"', entry)
        words = [match[1] for match in (shape, origin) if match]
        if size is not None:
            yield _bytes(size[1], size[2]), " ".join(words)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
