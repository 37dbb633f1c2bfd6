"""Named arrays that are read one at a time, for conversions.

Conversions stream: no step loads the whole model into memory. Files, checkpoints and views that
rename or rearrange arrays are all `LazyArrays`: names, shapes and dtypes are known up front, values
are read on request.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_READERS = 2
"""Arrays read concurrently: one waits for the disk while another is converted."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape of an array and the dtype it is stored in (`float32`, `bfloat16`, `Q4_1`)."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class LazyArrays:
    """Named arrays whose values are read on request.

    where: their file or directory, for messages. specs: by name, in the order to read them.
    reader: name -> values in float32; raises `ValueError` if they are damaged; thread-safe.
    slicer: (name, index of the leading axes) -> that slice; None if slices cannot be read alone.
    """

    where: str
    specs: Mapping[str, ArraySpec]
    reader: Callable[[str], np.ndarray]
    slicer: Callable[[str, tuple[int, ...]], np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """The values of one array in float32, whatever its stored dtype."""
        return self.reader(name)


def ahead(arrays: LazyArrays, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, values) in the order of `names` and prefetches the next arrays.

    Holds up to three arrays in addition to the one yielded last.
    """
    with concurrent.futures.ThreadPoolExecutor(_READERS, "read") as threads:
        waiting: collections.deque = collections.deque()
        try:
            for name in names:
                waiting.append((name, threads.submit(arrays.read, name)))
                if len(waiting) > _READERS:
                    first, value = waiting.popleft()
                    yield first, value.result()
            while waiting:
                first, value = waiting.popleft()
                yield first, value.result()
        finally:
            for _, value in waiting:
                value.cancel()


def from_arrays(arrays: Mapping[str, Any], where: str = "memory") -> LazyArrays:
    """`LazyArrays` over arrays in memory (anything that `numpy.asarray` takes)."""
    specs = {name: ArraySpec(np.shape(value)) for name, value in arrays.items()}

    def part(name: str, index: tuple[int, ...]) -> np.ndarray:
        return np.asarray(arrays[name], np.float32)[index]

    return LazyArrays(where, specs, lambda name: part(name, ()), part)


def nested(arrays: LazyArrays) -> dict[str, Any]:
    """All arrays, read into nested dictionaries along the dots of their names."""
    tree: dict[str, Any] = {}
    for name in arrays.specs:
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = arrays.read(name)
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested dictionaries, in their order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
