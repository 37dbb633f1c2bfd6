"""Network traffic of a step, counted in its optimised HLO.

Bytes are those that one chip receives in a ring algorithm, without padding. With n chips in the
group, and operand P and result R of one chip:

    all-gather          (n-1)/n of R        reduce-scatter      (n-1)/n of P
    all-reduce          twice (n-1)/n of P  all-to-all          (n-1)/n of P
    collective-permute  P                   broadcast           P

Where g of the n chips share a slice, a collective counts as two stages, one inside the slices and
one between chips at the same position of their slices: for an all-gather, (g-1)/g of R stays inside
and (n/g - 1)/n of R goes between slices, which adds up to the ring's total. In programs for several
TPU slices the second stage appears as sends to other slices; these count as the collective that
they implement.

Loop bodies are multiplied by their trip counts. Of a conditional, the branch with the most traffic
counts. An operation split over several fusions (asynchronous ones on TPU) counts where it starts.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

from mor_jax.planning.hlo import groups
from mor_jax.planning.hlo.loops import trip_count
from mor_jax.planning.hlo.text import Computation, Instruction, Module, total_bytes

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
)
_ASYNC = "async_collective_fusion_config"


@dataclasses.dataclass(frozen=True)
class Network:
    """How a program numbers its devices: `devices` in total, each slice `slice_size` in a row.

    A program for several TPU slices numbers the devices of one slice only.
    """

    devices: int
    slice_size: int
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation; figures are per execution.

    operand: type of a chip's operand. chips: size of the group. inside, between: bytes that a chip
    receives from its own slice and from others. op_name: its origin in the traced function.
    """

    kind: str
    operand: str
    chips: int
    inside: float
    between: float
    op_name: str

    @property
    def bytes(self) -> float:
        """Bytes received in total."""
        return self.inside + self.between


@dataclasses.dataclass(frozen=True)
class Tally:
    """Collectives of one step with their execution counts, and loops of unknown length.

    A loop of unknown length that contains collectives counts as one iteration.
    """

    runs: dict[Collective, int]
    unknown_loops: tuple[str, ...] = ()

    @property
    def inside(self) -> float:
        """Bytes that a chip receives from its own slice in a step."""
        return float(sum(one.inside * runs for one, runs in self.runs.items()))

    @property
    def between(self) -> float:
        """Bytes that a chip receives from other slices in a step."""
        return float(sum(one.between * runs for one, runs in self.runs.items()))

    @property
    def bytes(self) -> float:
        """Bytes that a chip receives in a step."""
        return self.inside + self.between

    def grouped(self, key: Callable[[Collective], str]) -> dict[str, "Tally"]:
        """Tallies by `key`, the one with the most bytes first."""
        parts: dict[str, dict[Collective, int]] = {}
        for one, runs in self.runs.items():
            parts.setdefault(key(one), {})[one] = runs
        tallies = {name: Tally(runs) for name, runs in parts.items()}
        return dict(sorted(tallies.items(), key=lambda item: -item[1].bytes))

    @property
    def count(self) -> int:
        """Executed operations per step."""
        return sum(self.runs.values())


def tally(module: Module, network: Network) -> Tally:
    """All collectives in one execution of `module`."""
    counter = _Counter(module, network)
    runs = counter.of(module.entry)
    return Tally(dict(runs), tuple(counter.unknown))


class _Counter:
    """Collectives by computation; results are cached."""

    def __init__(self, module: Module, network: Network):
        self._module, self._network = module, network
        self.unknown: list[str] = []
        self.of = functools.cache(self._of)

    def _of(self, name: str) -> collections.Counter[Collective]:
        computation = self._module.computations[name]
        counts: collections.Counter[Collective] = collections.Counter()
        for i in computation.instructions.values():
            if i.opcode == "while":
                counts.update(self._loop(computation, i))
            elif i.opcode == "conditional":
                branches = i.called("branch_computations", "true_computation", "false_computation")
                counts.update(max(map(self.of, branches), key=_traffic_bytes))
            elif i.opcode in ("fusion", "call", "async-start", "custom-call"):
                for callee in i.called("calls", "to_apply", "called_computations"):
                    counts.update(self.of(callee))
            elif (one := _collective(computation, i, self._network)) is not None:
                counts[one] += 1
        return counts

    def _loop(self, inside: Computation, loop: Instruction) -> collections.Counter[Collective]:
        body = self.of(loop.called("body")[0]) + self.of(loop.called("condition")[0])
        if not body:
            return body
        iterations = trip_count(self._module, inside, loop)
        if iterations is None:
            self.unknown.append(loop.name)
            iterations = 1
        return collections.Counter({one: runs * iterations for one, runs in body.items()})


def _traffic_bytes(counts: collections.Counter[Collective]) -> float:
    return float(sum(one.bytes * runs for one, runs in counts.items()))


def _collective(inside: Computation, i: Instruction, network: Network) -> Collective | None:
    """`i` as a collective; None if it is not one, moves nothing, or only continues another."""
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS or (_ASYNC in i.attributes and not _starts_collective(inside, i)):
        return None
    size = float(sum(total_bytes(operand) for operand in inside.operands(i)))
    types = ", ".join(_shape(operand) for operand in inside.operands(i)[:1])
    if len(i.operands) > 1 and kind != "send":
        types += f" and {len(i.operands) - 1} more"
    if kind == "send":
        sent = _send(i, size, network)
        return sent and Collective(sent[0], types, sent[1], 0.0, sent[2], i.op_name)
    if kind == "collective-permute":
        chips, inside_bytes, between = _permute(i, size, network)
    else:
        group = groups.largest_group(i, network.devices, network.slice_size)
        chips = group.chips
        if kind == "all-reduce" and _is_reduce_scatter(inside, i):
            kind = "reduce-scatter"
        inside_bytes, between = _ring(kind, size, group)
    if inside_bytes + between == 0:
        return None
    return Collective(kind, types, chips, inside_bytes, between, i.op_name)


def _ring(kind: str, operand: float, group: groups.GroupSize) -> tuple[float, float]:
    """Bytes from the own slice and from other slices; see the module's docstring."""
    n, g = group.chips, group.in_slice
    if n == 1:
        return 0.0, 0.0
    if kind.endswith("all-to-all"):
        return operand * (g - 1) / n, operand * (n - g) / n
    if kind == "collective-broadcast":
        return (operand, 0.0) if g == n else (0.0, operand)
    whole = operand * n if kind == "all-gather" else operand
    times = 2 if kind == "all-reduce" else 1
    return times * whole * (g - 1) / g, times * whole * (n // g - 1) / n


def _permute(i: Instruction, operand: float, network: Network) -> tuple[int, float, float]:
    pairs = groups.source_target_pairs(i.attributes)
    crossing = [a // network.slice_size != b // network.slice_size for a, b in pairs]
    chips = len({chip for pair in pairs for chip in pair})
    return chips, operand if not all(crossing) else 0.0, operand if any(crossing) else 0.0


def _send(i: Instruction, operand: float, network: Network) -> tuple[str, int, float] | None:
    """Kind, slices and bytes of a send to other slices; None if it only goes to the host."""
    if "megascale" not in i.attributes:
        return None
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    kind = transfer[1].lower().replace("_", "-") if transfer else "send"
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', i.attributes)
    slices = _count_numbers(target[1]) if target else network.slices
    if kind not in KINDS:
        return kind, slices, operand
    _, between = _ring(kind, operand, groups.GroupSize(slices, 1))
    return kind, slices, between


def _count_numbers(ranges: str) -> int:
    """How many numbers `1,2` or `0:3` lists; ranges include both ends."""
    ends = [[int(n) for n in part.split(":")] for part in ranges.split(",")]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _starts_collective(inside: Computation, i: Instruction) -> bool:
    return any('"AsyncCollectiveStart"' in user.attributes for user in inside.users[i.name])


def _is_reduce_scatter(inside: Computation, i: Instruction) -> bool:
    """Whether each chip uses only its slice of the all-reduce: a fused reduce-scatter."""
    fused = inside.name.startswith("all-reduce-scatter")
    users = list(_real_users(inside, i))
    return fused and bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _real_users(inside: Computation, i: Instruction) -> Iterable[Instruction]:
    """Users of a value, followed through tuples and bitcasts."""
    for user in inside.users[i.name]:
        if user.opcode in ("get-tuple-element", "bitcast"):
            yield from _real_users(inside, user)
        else:
            yield user


def _shape(i: Instruction) -> str:
    """Types without layouts: `bf16[1,960,2560]`."""
    return ", ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in i.arrays)
