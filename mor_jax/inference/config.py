"""Settings of the engine, and how many pages a budget of bytes buys."""

import dataclasses
from typing import Literal

import jax

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, check_not_negative, check_positive
from mor_jax.inference.load_model import LoadedModel
from mor_jax.models.decode.paged_cache import KVCacheSpec
from mor_jax.runtime.free_memory import free_bytes

_MOST_SLOTS = 256
"""Sequences where nobody has asked for a number."""

_VOCABULARY_BYTES = 19
"""Of a row, for each token of the vocabulary: counts for penalties, and logits to sample from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much runs at one time.

    slots: sequences that decode together; None: as many as the cache holds of `typical_length`
    tokens, at most 256. cache_bytes: for keys and values; None: for `slots` (or 32) sequences of
    full length, within half of the memory that is free. typical_length: only read where `slots` is
    None. page: tokens of a page. piece: tokens of a prompt that are stored between two ticks; the
    fewer, the shorter running answers wait. slack: pages beyond the expected share of tokens that a
    sequence reserves at each routed recursion. max_length: of prompt and answer, at least 2; None:
    the model's, or what the cache holds of one sequence if that is less. max_waiting: requests in
    the queue. dtype: of weights, activations and cache; None: the model's, but float32 on CPUs,
    which have no arithmetic for less. warm: compile every shape at the start.
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
        check_positive(path, self, "typical_length", "page", "piece", "max_waiting")
        check_not_negative(path, self, "slack")
        for name in ("slots", "cache_bytes", "max_length"):
            if getattr(self, name) is not None:
                check_positive(path, self, name)
        rule = "must be at least 2: a prompt has a token, and so has its answer"
        ok = self.max_length is None or self.max_length >= 2
        check(ok, f"{path}.max_length", self.max_length, rule, "Leave it out for the model's")


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What an engine holds. share: of a sequence's tokens that each list is given room for.

    max_length: of prompt and answer. One sequence of so many tokens has room in the cache even if
    all of them go through every recursion, so each one that is taken can be finished.
    """

    spec: KVCacheSpec
    slots: int
    end_pages: int
    block_pages: int
    max_length: int
    share: tuple[float, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages."""
        ends = self.end_pages * self.spec.end_page_bytes
        return ends + self.block_pages * self.spec.block_page_bytes

    def sequence_bytes(self, length: int) -> int:
        """Bytes of the pages that a sequence of `length` tokens reserves."""
        ends, lists = self.pages(length)
        spec = self.spec
        return ends * spec.end_page_bytes + sum(lists) * spec.block_page_bytes

    def holds(self, budget: int, length: int) -> int:
        """Sequences of `length` tokens whose pages take at most `budget` bytes."""
        return budget // self.sequence_bytes(length)

    def deepest_pages(self, length: int) -> tuple[int, int]:
        """Pages at the ends and in the block's pool of `length` tokens that all go all the way."""
        pages = -(-length // self.spec.size)
        return (pages if self.spec.end_layers else 0), pages * self.spec.lists

    def deepest_bytes(self, length: int) -> int:
        """Bytes of `deepest_pages`."""
        ends, block = self.deepest_pages(length)
        return ends * self.spec.end_page_bytes + block * self.spec.block_page_bytes

    def tokens(self, number: int, length: int) -> int:
        """Entries that list `number` is given room for in a sequence of `length` tokens."""
        return min(length, -int(-length * self.share[number] // 1))

    def pages(self, length: int) -> tuple[int, tuple[int, ...]]:
        """Pages that a sequence of `length` tokens reserves: at the ends, and in each list."""
        size = self.spec.size
        lists = range(self.spec.lists)
        ends = -(-length // size) if self.spec.end_layers else 0
        return ends, tuple(-(-self.tokens(number, length) // size) for number in lists)


def compute_config(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
    """The model in the dtype that generation runs in."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else cfg.dtype
    return dataclasses.replace(cfg, dtype=dtype)


def plan_cache(model: LoadedModel, cfg: EngineConfig) -> CachePlan:
    """Slots and pages for a model.

    Raises:
        ValueError: a setting out of range, or a budget that does not hold a page for every list.
    """
    cfg.validate()
    model_cfg = compute_config(model.cfg, cfg.dtype)
    longest = model_cfg.max_seq_len
    if cfg.max_length is not None:
        rule = f"the model's context is model.max_seq_len={longest} tokens"
        fix = "Use that or less"
        check(cfg.max_length <= longest, "engine.max_length", cfg.max_length, rule, fix)
        longest = cfg.max_length
    spec = KVCacheSpec(model_cfg, min(cfg.page, longest))
    share = tuple(
        1.0 if spec.holds_all(number) else min(1.0, model.shares[number] * (1 + cfg.slack))
        for number in range(spec.lists)
    )
    full = CachePlan(spec, cfg.slots or 32, 0, 0, longest, share)
    budget = _budget(full, cfg)
    held = _held(full, budget)
    rule = f"the cache of {budget:,} bytes holds {held} tokens that take every recursion"
    fix = f"Use that or less, or a cache of {full.deepest_bytes(longest):,} bytes"
    ok = cfg.max_length is None or held >= longest
    check(ok, "engine.max_length", cfg.max_length, rule, fix)
    slots = _slots(full, cfg, budget)
    ends, block = _split(full, budget, held)
    return dataclasses.replace(
        full, slots=slots, end_pages=ends, block_pages=block, max_length=held
    )


def _budget(full: CachePlan, cfg: EngineConfig) -> int:
    """Bytes for keys and values. Raises `ValueError` if they are too few, or not there."""
    free = free_bytes()
    if cfg.cache_bytes is None:
        wanted = full.slots * full.sequence_bytes(full.max_length)
        # The expected depths of a few sequences may come to less than one that goes all the way.
        budget = min(max(wanted, full.deepest_bytes(full.max_length)), free // 2)
    else:
        budget = cfg.cache_bytes
    rule = f"only {free:,} bytes of memory are free"
    check(budget <= free, "engine.cache_bytes", budget, rule, "Give less")
    least = full.deepest_bytes(2)
    rule = f"must hold a sequence's first pages, {least:,} bytes"
    check(budget >= least, "engine.cache_bytes", budget, rule, "Give more")
    return budget


def _slots(full: CachePlan, cfg: EngineConfig, budget: int) -> int:
    """Sequences that decode together. Raises `ValueError` if memory cannot hold so many rows."""
    if cfg.slots is None:
        return max(
            1, min(_MOST_SLOTS, full.holds(budget, min(cfg.typical_length, full.max_length)))
        )
    spec = full.spec
    tables = (1 + spec.lists) * -(-full.max_length // spec.size)
    each = _VOCABULARY_BYTES * spec.cfg.vocab_size + 4 * tables
    free = free_bytes() - budget
    rule = f"so many rows need {each * cfg.slots:,} bytes beside the cache, {free:,} are free"
    fix = f"Use {max(1, free // each)} or less"
    check(each * cfg.slots <= free, "engine.slots", cfg.slots, rule, fix)
    return cfg.slots


def _held(full: CachePlan, budget: int) -> int:
    """Tokens of one sequence that have room whatever their depths, at most `full.max_length`."""
    pages = budget // full.deepest_bytes(1)
    return min(full.max_length, pages * full.spec.size)


def _split(full: CachePlan, budget: int, held: int) -> tuple[int, int]:
    """Pages of the two pools: at the ends, and in the block.

    In the proportion that sequences of full length use them in, but not fewer than one sequence of
    `held` tokens may need of either.
    """
    ends, lists = full.pages(full.max_length)
    count = budget / full.sequence_bytes(full.max_length)
    least_ends, least_block = full.deepest_pages(held)
    spec = full.spec
    most = (budget - least_ends * spec.end_page_bytes) // spec.block_page_bytes
    block = max(least_block, min(int(sum(lists) * count), most))
    if not ends:
        return 0, block
    most = (budget - block * spec.block_page_bytes) // spec.end_page_bytes
    return max(least_ends, min(int(ends * count), most)), block
