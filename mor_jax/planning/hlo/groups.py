"""Parses which devices a collective connects, in all notations of HLO.

{{0,1},{2,3}}                         lists
[2,4]<=[4,2]T(1,0)                    an iota, reshaped and transposed
mesh['x'=2,'y'=4] {'y'}               axes of a mesh; part of an axis is 'y':(2)2
source_target_pairs={{0,1},{1,0}}     permutations
"""

import dataclasses
import itertools
import math
import re

import numpy as np

from mor_jax.planning.hlo.text import Instruction

Groups = tuple[tuple[int, ...], ...]

_LISTS = re.compile(r"replica_groups=\{(\{[^=]*?\})?\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"replica_groups=@?mesh[\[<]([^\]>]*)[\]>](?:,?\s*device_ids=\((.*?)\)(?=\s*\{))?\s*\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")


@dataclasses.dataclass(frozen=True)
class GroupSize:
    """Size of a group. in_slice: how many of its chips share a slice."""

    chips: int
    in_slice: int


def replica_groups(attributes: str, devices: int) -> Groups:
    """Groups of device numbers. Missing or empty groups mean one group of all `devices`."""
    if match := _IOTA.search(attributes):
        return _as_tuples(_iota(match[1]))
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    match = _LISTS.search(attributes)
    groups = re.findall(r"\{([\d,\s]+)\}", match[1] or "") if match else []
    if not groups:
        return (tuple(range(devices)),)
    return tuple(tuple(int(n) for n in group.split(",")) for group in groups)


def source_target_pairs(attributes: str) -> Groups:
    """(source, target) pairs of a permutation, without devices that send to themselves."""
    match = _PAIRS.search(attributes)
    numbers = [int(n) for n in re.findall(r"\d+", match[1] if match else "")]
    both = zip(numbers[::2], numbers[1::2], strict=True)
    return tuple((a, b) for a, b in both if a != b)


def largest_group(instruction: Instruction, devices: int, slice_size: int) -> GroupSize:
    """The size of the largest group; a slice is `slice_size` consecutive numbers."""
    largest = max(replica_groups(instruction.attributes, devices), key=len)
    slices = {number // slice_size for number in largest}
    return GroupSize(len(largest), math.ceil(len(largest) / len(slices)))


def _as_tuples(table: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in table)


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)` as an array of shape [2,4]."""
    shape, _, source = text.partition("<=")
    grid, _, order = source.partition("T")
    dims = [int(n) for n in re.findall(r"\d+", grid)]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if order:
        numbers = numbers.transpose([int(n) for n in re.findall(r"\d+", order)])
    return numbers.reshape([int(n) for n in re.findall(r"\d+", shape)])


def _mesh_groups(axes: str, ids: str | None, used: str) -> Groups:
    """Groups along the axes `used` of a mesh; `a:(p)s` is the middle part of a = p * s * rest."""
    sizes = {name.strip("'\" "): int(size) for name, size in _assignments(axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if ids is not None and ids.startswith("["):
        grid, _, order = ids.partition("T")
        numbers = _iota(f"[{len(numbers)}]<={grid}" + (f"T{order}" if order else ""))
    elif ids is not None:
        numbers = np.asarray([int(n) for n in ids.split(",")])
    parts = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", used)
    selected = [(name.strip(), int(pre or 1), int(size or 0)) for name, pre, size in parts]
    factors, positions = _factors(sizes, selected)
    numbers = numbers.reshape(factors)
    rest = [i for i in range(len(factors)) if i not in positions]
    group = math.prod(factors[i] for i in positions)
    return _as_tuples(numbers.transpose([*rest, *positions]).reshape(-1, group))


def _assignments(axes: str) -> list[tuple[str, str]]:
    return [(name, size) for name, _, size in (part.rpartition("=") for part in axes.split(","))]


def _factors(
    sizes: dict[str, int], selected: list[tuple[str, int, int]]
) -> tuple[list[int], list[int]]:
    """The mesh's shape with axes split into parts, and the positions of the selected parts."""
    factors: list[int] = []
    position: dict[tuple[str, int], int] = {}
    for name, axis in sizes.items():
        parts = [(pre, size or axis) for other, pre, size in selected if other == name]
        bounds = sorted({1, axis} | {p for p, _ in parts} | {p * s for p, s in parts})
        for low, high in itertools.pairwise(bounds):
            position[name, low] = len(factors)
            factors.append(high // low)
        if axis == 1:
            position[name, 1] = len(factors)
            factors.append(1)
    return factors, [position[name, pre] for name, pre, _ in selected]
