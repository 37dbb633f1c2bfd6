"""The train step compiled for devices that are not here.

A topology is written as the vendors do: `v5e:16x16` is one slice of 256 chips, `2xv5e:16x16` two
such slices that the data-centre network joins, `v5p:4x4x4` a cube of 64 chips. `h100:8x4` are four
nodes of eight GPUs. TPU programs come from the real compiler in the package `libtpu`, which needs
no TPU. For GPUs there is no such compiler: the step is cut over as many fake CPU devices, which
shows what each device holds and exchanges, not what its memory looks like in between.
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

# Name -> what JAX calls the device, dimensions of a slice, devices that JAX sees in a chip.
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
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_EXAMPLES = "Try v5e:16x16, v5p:4x4x4, v6e:16x16, 2xv5e:16x16 (two slices) or h100:8x4 (4 nodes)"

# libtpu looks for a TPU when it starts; these say that there is none to be asked about, and that
# other processes may have it loaded, which only matters where chips are shared.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that are rented together.

    name: as written. kind: as JAX names the device. slices: groups that only the data-centre
    network joins (TPU slices, GPU nodes). slice_size: devices of one of them, as JAX counts
    devices. slice_name: one slice alone, such as v5e:16x16.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    kind: str
    slices: int
    slice_size: int
    slice_name: str

    @property
    def devices(self) -> int:
        """All of them."""
        return self.slices * self.slice_size

    @property
    def chip(self) -> Chip:
        """What the vendor publishes."""
        return CHIPS[self.kind]


class OutOfMemory(Exception):
    """The compiler found that a program does not fit.

    needed, available: bytes of a device's memory. largest: bytes and description of allocations, if
    the compiler listed them.
    """

    def __init__(self, needed: int, available: int, largest: tuple[tuple[int, str], ...]):
        super().__init__(f"needs {needed} bytes of {available}")
        self.needed, self.available, self.largest = needed, available, largest


def parse_topology(name: str) -> Topology:
    """`2xv5e:16x16` -> two slices of 256 chips. Raises ValueError on a name or shape unknown."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*(?:-\w+)?):(\d+(?:x\d+)*)", name.strip().lower())
    if found is None:
        fail("topology", name, "is not NAME:SHAPE", _EXAMPLES)
    slices, kind, shape = int(found[1] or 1), found[2], found[3]
    check(slices > 0, "topology", name, "has no slice", _EXAMPLES)
    known = (*_TPUS, *_GPUS)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
        fail("topology", name, f"{kind!r} is none of {known}", f"Did you mean {near}:{shape}?")
    sizes = [int(size) for size in shape.split("x")]
    if kind in _GPUS:
        return _gpus(name, kind, slices, sizes)
    device, dimensions, cores = _TPUS[kind]
    fit = _slice_shapes(dimensions, max(sizes))
    if shape not in fit:
        near = min(fit, key=lambda other: _distance(other, sizes))
        rule = f"{kind} comes in slices of {dimensions} dimensions such as {', '.join(fit[-4:])}"
        fail("topology", name, rule, f"The nearest is {kind}:{near}")
    return Topology(name, "tpu", device, slices, math.prod(sizes) * cores, f"{kind}:{shape}")


def _gpus(name: str, kind: str, slices: int, sizes: list[int]) -> Topology:
    ok = len(sizes) <= 2 and slices == 1 and 1 <= sizes[0] <= 8
    fix = f"Try {kind}:8x4, four nodes of eight"
    check(ok, "topology", name, "GPUs are written NAME:GPUS_OF_A_NODExNODES, at most 8 a node", fix)
    nodes = sizes[1] if len(sizes) == 2 else 1
    return Topology(name, "gpu", _GPUS[kind], nodes, sizes[0], f"{kind}:{sizes[0]}")


def _slice_shapes(dimensions: int, largest: int) -> list[str]:
    if dimensions == 2:
        return list(_FLAT)
    sides = range(4, min(max(largest, 8), 24) + 4, 4)
    cubes = itertools.combinations_with_replacement(sides, 3)
    return [*_SMALL_CUBES, *("x".join(map(str, cube)) for cube in cubes)]


def _distance(shape: str, sizes: list[int]) -> float:
    return abs(math.log(math.prod(int(n) for n in shape.split("x")) / max(math.prod(sizes), 1)))


def devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices, slice by slice; they can be compiled for, not run on.

    Raises:
        ValueError: libtpu is missing, or this process has started JAX with too few CPU devices.
    """
    if topology.platform == "gpu":
        return _fake(topology)
    fix = "Run pip install -c requirements.lock -r requirements-tpu.txt; no TPU is needed"
    there = importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")
    rule = "the compiler for TPUs is in the package libtpu, which is not installed"
    check(bool(there), "topology", topology.name, rule, fix)
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(topology.slice_name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        fail("topology", topology.name, f"libtpu refuses it: {error}", _EXAMPLES)
    return sorted(found, key=lambda d: (getattr(d, "slice_index", None) or 0, d.id))


def _fake(topology: Topology) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has started; perhaps it has enough of them.
        if jax.config.jax_num_cpu_devices < topology.devices:
            jax.config.update("jax_num_cpu_devices", topology.devices)
    found = jax.devices("cpu")
    rule = f"needs {topology.devices} fake CPU devices, and JAX has started with {len(found)}"
    fix = "Plan GPUs in a process of their own, as launch/plan.py does"
    check(len(found) >= topology.devices, "topology", topology.name, rule, fix)
    return found[: topology.devices]


def mesh_of(cfg: TrainConfig, topology: Topology) -> Mesh:
    """The mesh that the configuration asks for. Raises ValueError where it does not match."""
    mesh = sharding.make_mesh(cfg.mesh, devices(topology))
    sharding.check_rows(mesh, "batch_size", cfg.batch_size, cfg.grad_accum_steps)
    return mesh


def abstract(cfg: TrainConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the state and of a batch, as training makes them."""
    shapes = abstract_params(cfg.model)
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), shapes)
    return compiled_step.abstract_state(cfg, mesh, placement), compiled_step.abstract_batch(
        cfg, mesh
    )


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled step. text: its optimised HLO. largest: bytes and types of its temporaries, the
    largest first, types that share a place together; empty where the compiler does not say."""

    compiled: jax.stages.Compiled
    text: str
    largest: tuple[tuple[int, str], ...] = ()


def compile_step(cfg: TrainConfig, mesh: Mesh) -> CompiledProgram:
    """The train step of the end of a run, when capacities are final.

    Raises:
        OutOfMemory: it does not fit the devices.
    """
    state, batch = abstract(cfg, mesh)
    step = compiled_step.jitted_steps(cfg)(capacity_tokens(cfg.model, cfg.seq_len))
    tpu = mesh.devices.flat[0].platform == "tpu"
    try:
        with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            # libtpu writes down what it made, in its own words: it may be newer than the reader of
            # its programs that JAX comes with.
            options = {"xla_dump_to": folder} if tpu else None
            compiled = step.lower(state, batch).compile(options)
            return _read(compiled, Path(folder))
    except jax.errors.JaxRuntimeError as error:
        if (found := out_of_memory(str(error))) is None:
            raise
        raise found from error


def _read(compiled: jax.stages.Compiled, folder: Path) -> CompiledProgram:
    texts = sorted(folder.glob("*.after_optimizations.txt"))
    reports = sorted(folder.glob("*.after_optimizations-memory-usage-report.txt"))
    text = texts[-1].read_text() if texts else compiled.as_text()
    largest = tuple(temporaries(reports[-1].read_text())) if reports else ()
    return CompiledProgram(compiled, text or "", largest)


_PLACE = re.compile(r"^[^;]*;\s*([\d.]+)([KMGT]?)i?B;[^;]*;[^;]*;\s*(.*)$", re.MULTILINE)


def temporaries(report: str, most: int = 8) -> list[tuple[int, str]]:
    """The largest places in the chip's main memory, from the compiler's report of its use.

    Places of equal use are added up: `2 x bf16[4,2048,960]`.
    """
    main = re.split(r"^Memory Space: ", report, flags=re.MULTILINE)[1:2]
    places: dict[tuple[int, str], int] = {}
    for number, unit, types in _PLACE.findall("".join(main)):
        place = (_bytes(number, unit), types)
        places[place] = places.get(place, 0) + 1
    whole = [(each * count, f"{count} x {types}") for (each, types), count in places.items()]
    return sorted(whole, reverse=True)[:most]


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)i?B?"
_SENTENCES = (
    rf"memory required[^(]*\({_SIZE}\) exceeds available \w+ \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"requires? {_SIZE}.*?(?:available|limit|capacity)\D*{_SIZE}",
)


def out_of_memory(message: str) -> OutOfMemory | None:
    """What the compiler's message says about memory; None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = next((f for s in _SENTENCES if (f := re.search(s, message, re.DOTALL))), None)
    if found is None:
        return None
    needed, available = _bytes(found[1], found[2]), _bytes(found[3], found[4])
    return OutOfMemory(needed, available, tuple(_allocations(message)))


def _allocations(message: str) -> Iterator[tuple[int, str]]:
    listed = re.split(r"\n\s*\d+\. Size: ", message)[1:]
    for entry in listed:
        size = re.match(_SIZE, entry)
        shape = re.search(r"Shape: (\S+)", entry)
        origin = re.search(r'op_name="([^"]*)"', entry)
        words = [found[1] for found in (shape, origin) if found]
        if size is not None:
            yield _bytes(size[1], size[2]), " ".join(words)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
