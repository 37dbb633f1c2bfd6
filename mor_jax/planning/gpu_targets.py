"""Descriptions of NVIDIA GPUs, to compile for them on a machine without a GPU.

With `jax[cuda]` installed, XLA compiles from a description of the GPU. Autotuning does not run, so
XLA takes the first of equivalent kernels. The numbers come from XLA's `target_config/specs`.
"""

import contextlib
import dataclasses
import importlib.util

import jax
from jax.experimental import topologies

from mor_jax.config.parsing import check

PLUGIN_PACKAGE = "jax_plugins"
"""The namespace package of JAX plugins."""


@dataclasses.dataclass(frozen=True)
class GPUTarget:
    """One kind of GPU.

    kind: JAX's device kind. cores: streaming multiprocessors. units: FPUs per core. bandwidth:
    bytes/s. cache: bytes of the L2 cache. clock: GHz. memory: bytes of the device. shared: bytes of
    shared memory per core. capability: major CUDA compute capability; the minor version is 0.
    """

    kind: str
    cores: int
    units: int
    bandwidth: int
    cache: int
    clock: float
    memory: int
    shared: int
    capability: int

    @property
    def opt_in(self) -> int:
        """Bytes of shared memory that a block can opt in to; the driver reserves 1 KiB per core."""
        return self.shared - 1024


TARGETS = {
    "h100": GPUTarget(
        "NVIDIA H100 80GB HBM3",
        132,
        128,
        3352320000000,
        52428800,
        1.98,
        84942979072,
        233472,
        9,
    ),
    "a100": GPUTarget(
        "NVIDIA A100-SXM4-80GB",
        108,
        64,
        2039040000000,
        41943040,
        1.41,
        85100068864,
        167936,
        8,
    ),
    "h200": GPUTarget(
        "NVIDIA H200", 132, 128, 4800000000000, 52428800, 1.98, 151397597184, 233472, 9
    ),
    "b200": GPUTarget(
        "NVIDIA B200", 148, 128, 7672320000000, 132644864, 1.965, 191514411008, 233472, 10
    ),
}

# Limits that all of them share.
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


def target_config(target: GPUTarget) -> str:
    """The GPU's description for XLA, a text proto."""
    numbers = _COMMON | {
        "core_count": target.cores,
        "fpus_per_core": target.units,
        "memory_bandwidth": target.bandwidth,
        "l2_cache_size": target.cache,
        "clock_rate_ghz": target.clock,
        "device_memory_size": target.memory,
        "shared_memory_per_core": target.shared,
        "shared_memory_per_block_optin": target.opt_in,
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in numbers.items())
    return (
        f"gpu_device_info {{\n{fields}\n"
        f"  cuda_compute_capability {{ major: {target.capability} }}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        "runtime_version { major: 12 minor: 8 }\n"
        f'device_description_str: "{target.kind}"\n'
    )


def gpu_devices(name: str, gpus: int = 1, nodes: int = 1) -> list[jax.Device]:
    """`nodes` x `gpus` devices of a kind in `TARGETS`, in node order, to compile for.

    Raises:
        ValueError: `TARGETS` has no such kind, or `jax[cuda]` is not installed.
    """
    rule = f"unknown GPU; known are {', '.join(TARGETS)}"
    check(name in TARGETS, "gpu", name, rule, "Try h100")
    fix = "Run pip install -c requirements.lock -r requirements-gpu.txt; no GPU is needed"
    check(
        _installed(), "gpu", name, "the GPU compiler is in jax[cuda], which is not installed", fix
    )
    description = topologies.get_topology_desc(
        platform="cuda",
        target_config=target_config(TARGETS[name]),
        topology=f"1x{nodes}x{gpus}",
    )
    return list(description.devices)


def _installed() -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        names = (f"{PLUGIN_PACKAGE}.xla_cuda{version}" for version in (12, 13))
        return any(importlib.util.find_spec(name) for name in names)
    return False
