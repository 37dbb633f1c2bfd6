"""Memory that is free, and programs that are refused before they take more of it."""

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
"""Files with a container's limit and use, of version 2 and of version 1."""


def free_bytes(device: jax.Device | None = None) -> int:
    """Memory that is free on a device (default: the first one), or on the host for a CPU."""
    found = (device or jax.local_devices()[0]).memory_stats()
    if found and "bytes_limit" in found:
        return found["bytes_limit"] - found.get("bytes_in_use", 0)
    return host_free_bytes()


def host_free_bytes(system: Path = Path("/")) -> int:
    """Memory that this process may still take: of the machine, and of its container.

    system: where the files of the kernel are.
    """
    told = system / "proc" / "meminfo"
    if told.exists():
        lines = dict(line.split(":", 1) for line in told.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in _CGROUPS:
        files = [system / "sys" / "fs" / "cgroup" / name for name in (limit, used)]
        if all(file.is_file() for file in files):
            numbers = [file.read_text().strip() for file in files]
            # Without a limit there is a word in its place.
            if all(number.isdecimal() for number in numbers):
                free = min(free, max(0, int(numbers[0]) - int(numbers[1])))
    return free


class CheckedFunction:
    """A function that is compiled for each shape of its arguments, ahead of the first call.

    A program that needs more memory than is free never runs.
    """

    def __init__(self, function: Callable[..., Any], setting: str, asked: int | None = None):
        """function: of parameters, a batch, other arrays, and static values by keyword. setting: of
        the rows of a batch, to be named in an error; asked: its value, where it is not the rows."""
        self._function, self._setting, self._asked = function, setting, asked
        self._compiled: dict[Any, Any] = {}

    def __call__(self, params: Any, batch: Any, *others: Any, **static: Any) -> Any:
        """What the function returns. Raises `ValueError` for more rows than fit into memory."""
        leaves, tree = jax.tree.flatten((params, batch, *others))
        each = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (tree, each, tuple(sorted(static.items())))
        if key not in self._compiled:
            jitted = jax.jit(self._function, static_argnames=tuple(static))
            compiled = jitted.lower(params, batch, *others, **static).compile()
            self._check(compiled, len(jax.tree.leaves(batch)[0]), leaves)
            self._compiled[key] = compiled
        return self._compiled[key](params, batch, *others)

    def _check(self, compiled: Any, rows: int, leaves: list[Any]) -> None:
        needed = bytes_of(compiled, leaves)
        free = free_bytes()
        if needed <= free:
            return
        told = f"batches of {rows:,} rows need {_size(needed)} of memory, {_size(free)} are free"
        fewer = rows * free // needed
        fix = f"Try {1 << (fewer.bit_length() - 1)}" if fewer else "Shorten the rows"
        fail(self._setting, rows if self._asked is None else self._asked, told, fix)


def bytes_of(compiled: Any, arguments: list[Any]) -> int:
    """What a program takes while it runs, beside its arguments: on one device, for CPUs on all."""
    stats = compiled.memory_analysis()
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes
    if jax.default_backend() != "cpu":
        return needed
    where = (getattr(x, "sharding", None) for x in arguments)
    return needed * max(len(getattr(sharding, "device_set", (None,))) for sharding in where)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
