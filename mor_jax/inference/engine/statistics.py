"""Counters of an engine, as plain numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """A snapshot; counters run from the engine's start.

    running, waiting: requests now. finished, cancelled, failed: requests that ended (deadlines
    count as cancelled). prompt_tokens: stored; recomputed ones again. tokens: of answers. ticks,
    rows, useful_rows: calls of the block, the rows of their shapes, and those that had work for it.
    overflows: pages beyond a sequence's reservation. preemptions: sequences that gave up their
    pages to others and were computed again. waits: rows that stood still for want of a page.
    pages, pages_used: of all pools. cache_bytes, used_bytes, stored_bytes: of all pages, of those
    given out, and of the entries in them. busy_seconds: since the start with work to do;
    host_seconds: of it, those that the engine's own thread spent at anything but waiting for the
    device; idle_seconds: of it, those in which the device had no work, at most. depth_counts:
    tokens, of prompts too, by the recursions that they went through.
    """

    running: int
    waiting: int
    slots: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    tokens: int
    ticks: int
    rows: int
    useful_rows: int
    overflows: int
    preemptions: int
    waits: int
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
    """The part of `Statistics` that only ever grows. Owned by the engine's thread."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    ticks: int = 0
    rows: int = 0
    useful_rows: int = 0
    overflows: int = 0
    preemptions: int = 0
    waits: int = 0
    busy_seconds: float = 0.0
    host_seconds: float = 0.0
    idle_seconds: float = 0.0
