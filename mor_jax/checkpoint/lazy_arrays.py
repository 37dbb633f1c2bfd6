"""Named arrays that are read one at a time: what every conversion reads from and writes from.

A conversion never holds a model. Files, checkpoints and the views that rename or rearrange are all
`LazyArrays`: their names, shapes and dtypes are known at once, their values come when asked for.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_READERS = 2
"""Arrays read at one time: one waits for the disk while another is turned."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape of an array, and the dtype that it is stored in (`float32`, `bfloat16`, `Q4_1`)."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class LazyArrays:
    """Named arrays.

    where: file or directory that they come from, for messages. specs: by name, in the order to
    read them in. reader: name -> values in float32; raises `ValueError` if they are damaged; may
    be called from several threads. slicer: (name, index of the leading axes) -> that part, where a
    part can be read alone.
    """

    where: str
    specs: Mapping[str, ArraySpec]
    reader: Callable[[str], np.ndarray]
    slicer: Callable[[str, tuple[int, ...]], np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """The values of one of them in float32, whatever they are stored in."""
        return self.reader(name)


def ahead(arrays: LazyArrays, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) in the order of `names`; the next ones are read meanwhile.

    Holds up to three arrays beside the one that was given out last.
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
    """Arrays that are in memory already (anything that `numpy.asarray` takes)."""
    specs = {name: ArraySpec(np.shape(value)) for name, value in arrays.items()}

    def part(name: str, index: tuple[int, ...]) -> np.ndarray:
        return np.asarray(arrays[name], np.float32)[index]

    return LazyArrays(where, specs, lambda name: part(name, ()), part)


def nested(arrays: LazyArrays) -> dict[str, Any]:
    """All of it, as nested dictionaries along the dots of the names."""
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
