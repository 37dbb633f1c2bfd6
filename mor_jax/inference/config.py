"""Settings of the engine, and the size of its KV cache."""

import dataclasses
from typing import Literal

import jax

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, check_not_negative, check_positive
from mor_jax.inference.load_model import LoadedModel
from mor_jax.models.decode.paged_cache import KVCacheSpec
from mor_jax.runtime.free_memory import free_bytes

_MAX_SLOTS = 256
"""Most slots by default."""

_VOCABULARY_BYTES = 19
"""Bytes per slot and vocabulary entry: penalty state, and logits to sample from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine.

    slots: sequences that decode together; None: as many of `typical_length` tokens as the cache
    holds, at most 256. cache_bytes: size of the KV cache; None: for `slots` (or 32) sequences of
    full length, within half of the free memory. typical_length: only used if `slots` is None. page:
    tokens per KV cache page. piece: prompt tokens prefilled between two decode steps; fewer delay
    running sequences less. slack: fraction of pages that a sequence reserves beyond the expected
    depth of its tokens, at each routed recursion. max_length: of prompt and output, at least 2;
    None: the model's, or what the cache holds of one sequence if that is less. max_waiting:
    requests in the waiting queue. dtype: of weights, activations and cache; None: the model's, but
    float32 on CPUs, which compute in nothing smaller. warm: compile every shape at the start.
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
        rule = "must be at least 2: one token of the prompt and one of the output"
        ok = self.max_length is None or self.max_length >= 2
        check(ok, f"{path}.max_length", self.max_length, rule, "Leave it out for the model's")


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Slots and KV cache pages of an engine.

    max_length: of prompt and output. One sequence of this length fits the cache even if all its
    tokens go through every recursion, so every accepted request can finish. share: fraction of a
    sequence's tokens for which it reserves space in each KV list.
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
        """How many sequences of `length` tokens fit into `budget` bytes."""
        return budget // self.sequence_bytes(length)

    def deepest_pages(self, length: int) -> tuple[int, int]:
        """Pages of the end layers and of the block if all `length` tokens take every recursion."""
        pages = -(-length // self.spec.size)
        return (pages if self.spec.end_layers else 0), pages * self.spec.lists

    def deepest_bytes(self, length: int) -> int:
        """Bytes of `deepest_pages`."""
        ends, block = self.deepest_pages(length)
        return ends * self.spec.end_page_bytes + block * self.spec.block_page_bytes

    def tokens(self, number: int, length: int) -> int:
        """Entries of KV list `number` that a sequence of `length` tokens reserves."""
        return min(length, -int(-length * self.share[number] // 1))

    def pages(self, length: int) -> tuple[int, tuple[int, ...]]:
        """Pages that a sequence of `length` tokens reserves: for the end layers, for each list."""
        size = self.spec.size
        lists = range(self.spec.lists)
        ends = -(-length // size) if self.spec.end_layers else 0
        return ends, tuple(-(-self.tokens(number, length) // size) for number in lists)


def compute_config(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
    """The model config with the dtype of generation."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else cfg.dtype
    return dataclasses.replace(cfg, dtype=dtype)


def plan_cache(model: LoadedModel, cfg: EngineConfig) -> CachePlan:
    """Computes slots and pages for a model.

    Raises:
        ValueError: a setting is out of range, or the cache is too small for one sequence.
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
    longest_sequence = _longest_sequence(full, budget)
    rule = (
        f"the cache of {budget:,} bytes holds {longest_sequence} tokens that take every recursion"
    )
    fix = f"Use that or less, or a cache of {full.deepest_bytes(longest):,} bytes"
    ok = cfg.max_length is None or longest_sequence >= longest
    check(ok, "engine.max_length", cfg.max_length, rule, fix)
    slots = _slots(full, cfg, budget)
    ends, block = _split_pages(full, budget, longest_sequence)
    return dataclasses.replace(
        full, slots=slots, end_pages=ends, block_pages=block, max_length=longest_sequence
    )


def _budget(full: CachePlan, cfg: EngineConfig) -> int:
    """Bytes of the KV cache. Raises `ValueError` if they are too few, or not free."""
    free = free_bytes()
    if cfg.cache_bytes is None:
        full_bytes = full.slots * full.sequence_bytes(full.max_length)
        # A few sequences of expected depth may need less than one whose tokens all go deepest.
        budget = min(max(full_bytes, full.deepest_bytes(full.max_length)), free // 2)
    else:
        budget = cfg.cache_bytes
    rule = f"only {free:,} bytes of memory are free"
    check(budget <= free, "engine.cache_bytes", budget, rule, "Use less")
    min_bytes = full.deepest_bytes(2)
    rule = f"must hold a sequence's first pages, {min_bytes:,} bytes"
    check(budget >= min_bytes, "engine.cache_bytes", budget, rule, "Use more")
    return budget


def _slots(full: CachePlan, cfg: EngineConfig, budget: int) -> int:
    """Number of slots. Raises `ValueError` if they do not fit into memory."""
    if cfg.slots is None:
        return max(1, min(_MAX_SLOTS, full.holds(budget, min(cfg.typical_length, full.max_length))))
    spec = full.spec
    tables = (1 + spec.lists) * -(-full.max_length // spec.size)
    bytes_per_slot = _VOCABULARY_BYTES * spec.cfg.vocab_size + 4 * tables
    free = free_bytes() - budget
    rule = f"so many slots need {bytes_per_slot * cfg.slots:,} bytes besides the cache"
    rule += f"; {free:,} are free"
    fix = f"Use {max(1, free // bytes_per_slot)} or less"
    check(bytes_per_slot * cfg.slots <= free, "engine.slots", cfg.slots, rule, fix)
    return cfg.slots


def _longest_sequence(full: CachePlan, budget: int) -> int:
    """Tokens of one sequence that fit at any depth, at most `full.max_length`."""
    pages = budget // full.deepest_bytes(1)
    return min(full.max_length, pages * full.spec.size)


def _split_pages(full: CachePlan, budget: int, longest_sequence: int) -> tuple[int, int]:
    """Pages of the two pools: of the end layers, and of the block.

    In the proportion in which sequences of full length use them, but no fewer of either than one
    sequence of `longest` tokens may need.
    """
    ends, lists = full.pages(full.max_length)
    count = budget / full.sequence_bytes(full.max_length)
    least_ends, least_block = full.deepest_pages(longest_sequence)
    spec = full.spec
    max_pages = (budget - least_ends * spec.end_page_bytes) // spec.block_page_bytes
    block = max(least_block, min(int(sum(lists) * count), max_pages))
    if not ends:
        return 0, block
    max_pages = (budget - block * spec.block_page_bytes) // spec.end_page_bytes
    return max(least_ends, min(int(ends * count), max_pages)), block
