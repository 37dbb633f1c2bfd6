"""The figures of a plan, as dataclasses. Bytes and FLOPs are per chip and step."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one chip.

    parameters, optimizer, batch: from shapes. arguments: all three as the compiled step stores
    them, tile padding included. temporaries: in addition, while the step runs; None without a
    compiler for the device. program: the code. host: host memory per chip. available: the chip's
    memory. estimate: activations saved for the backward pass, gradients and logits, computed from
    shapes. largest: bytes and types of the largest temporaries.
    """

    parameters: int
    optimizer: int
    batch: int
    arguments: int
    temporaries: int | None
    program: int
    host: int
    available: int
    estimate: int
    largest: tuple[tuple[int, str], ...] = ()

    @property
    def total(self) -> int:
        """Bytes in use at the peak; `estimate` replaces unknown temporaries."""
        temporaries = self.estimate if self.temporaries is None else self.temporaries
        return self.arguments + temporaries + self.program

    @property
    def fits(self) -> bool:
        """Whether `total` is within `available`."""
        return self.total <= self.available


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """One row of the table of collectives.

    kind: such as all-gather. what: what is exchanged, as far as the HLO names it. count: operations
    per step. inside, between: bytes that a chip receives from its own slice and from other slices.
    """

    kind: str
    what: str
    count: int
    inside: float
    between: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGatherCost:
    """How often a step all-gathers one class of parameters.

    what: `shared block` or `other parameters`. forward, backward: 1.0 means all of them once.
    """

    what: str
    forward: float
    backward: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds per step if limited by one resource alone; None where its peak is unknown.

    matrix: executed FLOPs at the peak of the matrix units. memory: traffic with the chip's main
    memory. inside, between: bytes received from the own slice and from other slices.
    """

    matrix: float
    memory: float | None
    inside: float | None
    between: float | None

    @property
    def known(self) -> dict[str, float]:
        """The known times, by resource."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}

    @property
    def binds(self) -> str:
        """The resource that takes longest."""
        return max(self.known, key=lambda name: self.known[name])

    @property
    def step(self) -> float:
        """Seconds per step if everything overlaps: the longest time."""
        return max(self.known.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One configuration on one topology.

    variant: plain (vanilla), recursive or mor. mesh: devices by axis. settings: other settings that
    the figures depend on. model_flops: the FLOPs that count for MFU, those of the routed tokens.
    hardware_flops: executed FLOPs. memory_traffic: bytes between the chip and its main memory; None
    without a compiler for the device. tokens: per step over all chips. budget: tokens of the whole
    run. mfu: upper bound, a fraction. notes: caveats about these figures.
    """

    variant: str
    topology: str
    chip: str
    chips: int
    slices: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    parameters: int
    memory: MemoryUse
    exchanges: tuple[CollectiveCost, ...]
    gathered: tuple[AllGatherCost, ...]
    model_flops: float
    hardware_flops: float
    memory_traffic: float | None
    times: StepTimes
    mfu: float
    tokens: int
    budget: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def inside(self) -> float:
        """Bytes that a chip receives from its own slice."""
        return float(sum(row.inside for row in self.exchanges))

    @property
    def between(self) -> float:
        """Bytes that a chip receives from other slices."""
        return float(sum(row.between for row in self.exchanges))

    @property
    def tokens_per_second(self) -> float:
        """Upper bound, over all chips."""
        return self.tokens / self.times.step

    @property
    def days(self) -> float:
        """Days of the whole run at `tokens_per_second`."""
        return float(self.budget / self.tokens_per_second / 86400)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the figures derived from them, for JSON."""
        return dataclasses.asdict(self) | {
            "fits": self.memory.fits,
            "memory_total": self.memory.total,
            "network_inside": self.inside,
            "network_between": self.between,
            "binds": self.times.binds,
            "step_seconds": self.times.step,
            "tokens_per_second": self.tokens_per_second,
            "days": self.days,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt with changed settings. short: bytes missing, None if the step fits."""

    settings: dict[str, Any]
    short: int | None
    seconds: float
    total: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
    """A configuration that does not fit.

    needed, available: bytes, from the compiler. parts: bytes by use, from shapes and estimates,
    largest first. largest: the compiler's list of allocations, if it gives one. attempts: changed
    settings in the order tried. out_of_time: the time limit ended the search.
    """

    variant: str
    topology: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    needed: int
    available: int
    parts: tuple[tuple[str, int], ...]
    largest: tuple[tuple[int, str], ...]
    attempts: tuple[Attempt, ...] = ()
    out_of_time: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self) | {"fits": False}
