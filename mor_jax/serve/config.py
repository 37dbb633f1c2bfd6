"""Settings of the engine, and how many pages a budget of bytes buys."""

import dataclasses
from typing import Literal

import jax

from mor_jax.config import ModelConfig
from mor_jax.free_memory import free_bytes
from mor_jax.models.cached.pages import Geometry
from mor_jax.parsing import check, not_negative, positive
from mor_jax.serve.served import Served


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much runs at one time.

    slots: sequences that decode together; None: as many as the cache holds of `typical_length`
    tokens, at most 256. cache_bytes: for keys and values; None: for `slots` (or 32) sequences of
    full length, within half of the memory that is free. typical_length: only read where `slots` is
    None. page: tokens of a page. piece: tokens of a prompt that are stored between two ticks; the
    fewer, the shorter running answers wait. slack: pages beyond the expected share of tokens that a
    sequence reserves at each routed recursion. max_length: of prompt and answer; None: the model's.
    max_waiting: requests in the queue. dtype: of weights, activations and cache; None: the model's,
    but float32 on CPUs, which have no arithmetic for less. warm: compile every shape at the start.
    """

    slots: int | None = None
    cache_bytes: int | None = None
    typical_length: int = 512
    page: int = 32
    piece: int = 256
    slack: float = 0.1
    max_length: int | None = None
    max_waiting: int = 1024
    dtype: Literal["bfloat16", "float32"] | None = None
    warm: bool = False

    def validate(self, path: str = "engine") -> None:
        """Raises `ValueError` on a setting out of range."""
        positive(path, self, "typical_length", "page", "piece", "max_waiting")
        not_negative(path, self, "slack")
        for name in ("slots", "cache_bytes", "max_length"):
            if getattr(self, name) is not None:
                positive(path, self, name)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an engine holds. share: of a sequence's tokens that each list is given room for."""

    geometry: Geometry
    slots: int
    end_pages: int
    block_pages: int
    max_length: int
    share: tuple[float, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages."""
        ends = self.end_pages * self.geometry.end_page_bytes
        return ends + self.block_pages * self.geometry.block_page_bytes

    def sequence_bytes(self, length: int) -> int:
        """Bytes of the pages that a sequence of `length` tokens reserves."""
        ends, lists = self.pages(length)
        geometry = self.geometry
        return ends * geometry.end_page_bytes + sum(lists) * geometry.block_page_bytes

    def holds(self, budget: int, length: int) -> int:
        """Sequences of `length` tokens whose pages take at most `budget` bytes."""
        return budget // self.sequence_bytes(length)

    def tokens(self, number: int, length: int) -> int:
        """Entries that list `number` is given room for in a sequence of `length` tokens."""
        return min(length, -int(-length * self.share[number] // 1))

    def pages(self, length: int) -> tuple[int, tuple[int, ...]]:
        """Pages that a sequence of `length` tokens reserves: at the ends, and in each list."""
        size = self.geometry.size
        lists = range(self.geometry.lists)
        ends = -(-length // size) if self.geometry.end_layers else 0
        return ends, tuple(-(-self.tokens(number, length) // size) for number in lists)


def compute_config(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
    """The model in the dtype that generation runs in."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else cfg.dtype
    return dataclasses.replace(cfg, dtype=dtype)


def plan(served: Served, cfg: EngineConfig) -> Plan:
    """Slots and pages for a model.

    Raises:
        ValueError: a setting out of range, or a budget that does not hold a page for every list.
    """
    cfg.validate()
    model = compute_config(served.cfg, cfg.dtype)
    longest = model.max_length
    if cfg.max_length is not None:
        rule = f"the model's context is model.max_length={longest} tokens"
        fix = "Use that or less"
        check(cfg.max_length <= longest, "engine.max_length", cfg.max_length, rule, fix)
        longest = cfg.max_length
    geometry = Geometry(model, min(cfg.page, longest))
    share = tuple(
        1.0 if geometry.holds_all(number) else min(1.0, served.shares[number] * (1 + cfg.slack))
        for number in range(geometry.lists)
    )
    full = Plan(geometry, cfg.slots or 32, 0, 0, longest, share)
    wanted = full.slots * full.sequence_bytes(longest)
    free = free_bytes()
    budget = min(wanted, free // 2) if cfg.cache_bytes is None else cfg.cache_bytes
    rule = f"only {free:,} bytes of memory are free"
    check(budget <= free, "engine.cache_bytes", budget, rule, "Give less")
    slots = cfg.slots or full.holds(budget, min(cfg.typical_length, longest))
    slots = max(1, min(256, slots))
    # Pages of the two pools in the proportion that sequences of full length use them in.
    ends, lists = full.pages(longest)
    count = budget / full.sequence_bytes(longest)
    rule = f"must hold a sequence's first pages, {full.sequence_bytes(1):,} bytes"
    enough = budget >= full.sequence_bytes(1)
    check(enough, "engine.cache_bytes", int(budget), rule, "Give more, or use smaller pages")
    pages = max(ends and 1, int(ends * count)), max(geometry.lists, int(sum(lists) * count))
    return dataclasses.replace(full, slots=slots, end_pages=pages[0], block_pages=pages[1])
