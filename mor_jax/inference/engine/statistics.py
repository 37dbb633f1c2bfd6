"""Counters of an engine, as plain numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """A snapshot; counters start with the engine.

    running, waiting: requests now. finished, cancelled, failed: requests that ended (a deadline
    counts as cancelled). prompt_tokens: prefilled, recomputed ones included. tokens: generated.
    decode_steps, rows, useful_rows: calls of the block, the rows of their shapes, and the rows that
    the block computed. overflows: pages beyond a sequence's reservation. preemptions: sequences
    that lost their pages and were recomputed. stalls: rows that waited for a page.
    pages, pages_used: of all pools. cache_bytes, used_bytes, stored_bytes: of all pages, of the
    allocated ones, and of the entries in them. busy_seconds: with work to do; of these,
    host_seconds: not spent on waiting for the device, and idle_seconds: upper bound of the time in
    which the device had no work. depth_counts: tokens, those of prompts included, by their depth in
    recursions.
    """

    running: int
    waiting: int
    slots: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    tokens: int
    decode_steps: int
    rows: int
    useful_rows: int
    overflows: int
    preemptions: int
    stalls: int
    pages: int
    pages_used: int
    cache_bytes: int
    used_bytes: int
    stored_bytes: int
    busy_seconds: float
    host_seconds: float
    idle_seconds: float
    depth_counts: tuple[int, ...]


@dataclasses.dataclass
class Counters:
    """The counters of `Statistics`. Only the engine's thread writes them."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    decode_steps: int = 0
    rows: int = 0
    useful_rows: int = 0
    overflows: int = 0
    preemptions: int = 0
    stalls: int = 0
    busy_seconds: float = 0.0
    host_seconds: float = 0.0
    idle_seconds: float = 0.0
