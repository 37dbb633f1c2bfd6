"""Which devices a collective joins, in every form in which HLO writes it.

{{0,1},{2,3}}                         lists
[2,4]<=[4,2]T(1,0)                    numbers counted through a transposed grid
mesh['x'=2,'y'=4] {'y'}               axes of a mesh, parts of an axis as 'y':(2)2
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
class Reach:
    """The largest group of a collective: chips in it, and how many of them share a slice."""

    chips: int
    in_slice: int


def replica_groups(attributes: str, devices: int) -> Groups:
    """Groups of device numbers. No groups, or none written, means all `devices` together."""
    if found := _IOTA.search(attributes):
        return _rows(_iota(found[1]))
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    found = _LISTS.search(attributes)
    groups = re.findall(r"\{([\d,\s]+)\}", found[1] or "") if found else []
    if not groups:
        return (tuple(range(devices)),)
    return tuple(tuple(int(n) for n in group.split(",")) for group in groups)


def pairs(attributes: str) -> Groups:
    """(source, target) of a permutation, without devices that send to themselves."""
    found = _PAIRS.search(attributes)
    numbers = [int(n) for n in re.findall(r"\d+", found[1] if found else "")]
    both = zip(numbers[::2], numbers[1::2], strict=True)
    return tuple((a, b) for a, b in both if a != b)


def reach(instruction: Instruction, devices: int, slice_size: int) -> Reach:
    """The group that holds most chips; a slice is `slice_size` numbers in a row."""
    largest = max(replica_groups(instruction.attributes, devices), key=len)
    slices = {number // slice_size for number in largest}
    return Reach(len(largest), math.ceil(len(largest) / len(slices)))


def _rows(table: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in table)


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)` as an array of shape [2,4]."""
    shape, _, source = text.partition("<=")
    grid, _, turn = source.partition("T")
    dims = [int(n) for n in re.findall(r"\d+", grid)]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if turn:
        numbers = numbers.transpose([int(n) for n in re.findall(r"\d+", turn)])
    return numbers.reshape([int(n) for n in re.findall(r"\d+", shape)])


def _mesh_groups(axes: str, ids: str | None, used: str) -> Groups:
    """Groups along the axes `used` of a mesh; `a:(p)s` is the middle part of a = p * s * rest."""
    sizes = {name.strip("'\" "): int(size) for name, size in _assignments(axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if ids is not None and ids.startswith("["):
        grid, _, turn = ids.partition("T")
        numbers = _iota(f"[{len(numbers)}]<={grid}" + (f"T{turn}" if turn else ""))
    elif ids is not None:
        numbers = np.asarray([int(n) for n in ids.split(",")])
    parts = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", used)
    wanted = [(name.strip(), int(pre or 1), int(size or 0)) for name, pre, size in parts]
    factors, positions = _factors(sizes, wanted)
    numbers = numbers.reshape(factors)
    rest = [i for i in range(len(factors)) if i not in positions]
    group = math.prod(factors[i] for i in positions)
    return _rows(numbers.transpose([*rest, *positions]).reshape(-1, group))


def _assignments(axes: str) -> list[tuple[str, str]]:
    return [(name, size) for name, _, size in (part.rpartition("=") for part in axes.split(","))]


def _factors(
    sizes: dict[str, int], wanted: list[tuple[str, int, int]]
) -> tuple[list[int], list[int]]:
    """The mesh's shape with axes cut where parts of them are wanted, and where those stand."""
    factors: list[int] = []
    place: dict[tuple[str, int], int] = {}
    for name, whole in sizes.items():
        mine = [(pre, size or whole) for other, pre, size in wanted if other == name]
        bounds = sorted({1, whole} | {p for p, _ in mine} | {p * s for p, s in mine})
        for low, high in itertools.pairwise(bounds):
            place[name, low] = len(factors)
            factors.append(high // low)
        if whole == 1:
            place[name, 1] = len(factors)
            factors.append(1)
    return factors, [place[name, pre] for name, pre, _ in wanted]
