"""The figures of a plan, as plain values. Bytes and FLOPs are of one chip and one step."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one chip.

    parameters, optimizer, batch: by shapes. arguments: all three as the compiled program holds
    them, with the padding of their tiles. temporaries: beside them while the step runs; None where
    no compiler for the device is here. program: the code itself. host: in the host's memory, for
    one chip. available: the chip's memory. estimate: activations that wait for the backward pass,
    gradients and logits, by our accounting. largest: bytes and types of the largest temporaries.
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
        """Bytes in use at the peak; without temporaries, arguments and the estimate."""
        beside = self.estimate if self.temporaries is None else self.temporaries
        return self.arguments + beside + self.program

    @property
    def fits(self) -> bool:
        """Whether `total` is within `available`."""
        return self.total <= self.available


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """One row of the network's table.

    kind: such as all-gather. what: what is exchanged, as far as the program says. count: operations
    in a step. inside, between: bytes that a chip receives inside its slice, and from other slices.
    """

    kind: str
    what: str
    count: int
    inside: float
    between: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGatherCost:
    """How often parameters of one class go through an all-gather in a step.

    what: `shared block` or `other parameters`. forward, backward: times, 1.0 for every one of them
    once.
    """

    what: str
    forward: float
    backward: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds that one step would take if only one thing took time; None where a peak is unknown.

    matrix: the FLOPs that the program executes, at the peak of the matrix units. memory: traffic
    with the chip's main memory. inside, between: bytes received over the two networks.
    """

    matrix: float
    memory: float | None
    inside: float | None
    between: float | None

    @property
    def known(self) -> dict[str, float]:
        """Those that are known, by name."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}

    @property
    def binds(self) -> str:
        """The name of the longest."""
        return max(self.known, key=lambda name: self.known[name])

    @property
    def step(self) -> float:
        """Seconds of a step in which everything overlaps: the longest."""
        return max(self.known.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One configuration on one topology.

    variant: plain, recursive or mor. mesh: devices by axis. settings: what else the figures depend
    on. model_flops: those of the MFU, of the tokens routed. hardware_flops: those executed.
    memory_traffic: bytes between the chip and its main memory; None where no compiler for the
    device is here. tokens: of one step over all chips. budget: tokens of the whole run. mfu:
    ceiling, share of the peak. notes: what a reader must know about these figures.
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
        """Bytes that a chip receives from its slice."""
        return float(sum(row.inside for row in self.exchanges))

    @property
    def between(self) -> float:
        """Bytes that a chip receives from other slices."""
        return float(sum(row.between for row in self.exchanges))

    @property
    def tokens_per_second(self) -> float:
        """Ceiling, over all chips."""
        return self.tokens / self.times.step

    @property
    def days(self) -> float:
        """Of the whole run at the ceiling."""
        return float(self.budget / self.tokens_per_second / 86400)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and what follows from them."""
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
    """Other settings that were compiled. short: bytes missing, None if they fit."""

    settings: dict[str, Any]
    short: int | None
    seconds: float
    total: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
    """A configuration that does not fit.

    needed, available: bytes as the compiler says. parts: what takes how much, in bytes, by shapes
    and by our accounting, the largest first. largest: the compiler's own list of allocations, if it
    gave one. attempts: other settings, in the order in which they were tried. out_of_time: whether
    others were left untried.
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
        """For JSON."""
        return dataclasses.asdict(self) | {"fits": False}
