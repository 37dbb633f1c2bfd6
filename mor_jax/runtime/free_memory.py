"""Free memory, and compiled functions that fail early instead of running out of memory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mor_jax.config.parsing import fail

_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files with a container's memory limit and usage, of cgroup version 2 and of version 1."""


def free_bytes(device: jax.Device | None = None) -> int:
    """Free memory of a device (default: the first one), or of the host for a CPU."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_free_bytes()


def host_free_bytes(system: Path = Path("/")) -> int:
    """Memory that this process can still allocate: the less of the machine's and the container's.

    system: root of the kernel's files, for tests.
    """
    meminfo = system / "proc" / "meminfo"
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in _CGROUPS:
        files = [system / "sys" / "fs" / "cgroup" / name for name in (limit, used)]
        if all(file.is_file() for file in files):
            numbers = [file.read_text().strip() for file in files]
            # Without a limit the file holds the word "max".
            if all(number.isdecimal() for number in numbers):
                free = min(free, max(0, int(numbers[0]) - int(numbers[1])))
    return free


class CheckedFunction:
    """A function that is compiled ahead of time for each shape of its arguments.

    A compiled function that needs more memory than is free never runs.
    """

    def __init__(self, function: Callable[..., Any], setting: str, value: int | None = None):
        """function: of parameters, a batch, other arrays, and static values by keyword. setting:
        name of the batch size, for the error; value: its value, by default the batch size itself.
        """
        self._function, self._setting, self._value = function, setting, value
        self._compiled: dict[Any, Any] = {}

    def __call__(self, params: Any, batch: Any, *others: Any, **static: Any) -> Any:
        """Calls the function. Raises `ValueError` if the batch does not fit into memory."""
        leaves, tree = jax.tree.flatten((params, batch, *others))
        avals = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (tree, avals, tuple(sorted(static.items())))
        if key not in self._compiled:
            jitted = jax.jit(self._function, static_argnames=tuple(static))
            compiled = jitted.lower(params, batch, *others, **static).compile()
            self._check(compiled, len(jax.tree.leaves(batch)[0]), leaves)
            self._compiled[key] = compiled
        return self._compiled[key](params, batch, *others)

    def _check(self, compiled: Any, batch_size: int, leaves: list[Any]) -> None:
        needed = working_bytes(compiled, leaves)
        free = free_bytes()
        if needed <= free:
            return
        rule = f"batches of {batch_size:,} sequences need {_size(needed)} of memory, "
        rule += f"{_size(free)} are free"
        fits = batch_size * free // needed
        fix = f"Try {1 << (fits.bit_length() - 1)}" if fits else "Shorten the sequences"
        fail(self._setting, batch_size if self._value is None else self._value, rule, fix)


def working_bytes(compiled: Any, arguments: list[Any]) -> int:
    """Memory of temporaries and outputs of a compiled function: per device, on CPUs of all."""
    stats = compiled.memory_analysis()
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes
    if jax.default_backend() != "cpu":
        return needed
    shardings = (getattr(x, "sharding", None) for x in arguments)
    return needed * max(len(getattr(sharding, "device_set", (None,))) for sharding in shardings)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
