"""What /metrics shows, in Prometheus' text form: of the server, and of the engine."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mor_jax.inference.engine.statistics import Statistics

# Seconds.
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_LENGTHS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

# Name in Statistics -> name and meaning here.
_COUNTERS = {
    "finished": ("engine_finished", "Answers that were completed"),
    "cancelled": ("engine_cancelled", "Answers that were given up or cut off"),
    "failed": ("engine_failed", "Answers that ended with an error"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts that were stored"),
    "tokens": ("generated_tokens", "Tokens that were generated"),
    "ticks": ("engine_ticks", "Steps of the engine"),
    "rows": ("engine_rows", "Rows of all calls of the block"),
    "useful_rows": ("engine_useful_rows", "Rows that had work for it"),
    "overflows": ("cache_overflows", "Pages beyond what a sequence had reserved"),
    "preemptions": ("engine_preemptions", "Sequences that gave their pages up and began again"),
    "waits": ("cache_waits", "Rows that stood still for want of a page"),
    "busy_seconds": ("engine_busy_seconds", "Seconds with work to do"),
    "host_seconds": ("engine_host_seconds", "Of these, those not spent on waiting for the device"),
    "idle_seconds": ("engine_idle_seconds", "Of these, those in which the device had no work"),
}
_GAUGES = {
    "running": ("engine_running", "Sequences in slots"),
    "waiting": ("engine_waiting", "Requests in the queue"),
    "slots": ("engine_slots", "Slots for sequences"),
    "pages": ("cache_pages", "Pages of the cache"),
    "pages_used": ("cache_pages_used", "Pages that hold keys and values"),
    "cache_bytes": ("cache_bytes", "Bytes of all pages"),
    "used_bytes": ("cache_used_bytes", "Bytes of the pages that hold something"),
    "stored_bytes": ("cache_stored_bytes", "Bytes of the keys and values in them"),
}


class ServerMetrics:
    """Counters of the server. `text` adds those of the engine as they are at that moment."""

    def __init__(self, statistics: Callable[[], Statistics], version: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mor_http_requests", "Answered requests", ("endpoint", "status"), registry=self.registry
        )
        self.at_work = Gauge(
            "mor_http_requests_at_work", "Requests being answered", registry=self.registry
        )
        self.ended = Counter(
            "mor_choices", "Answers by how they ended", ("reason",), registry=self.registry
        )
        self.first_token = self._seconds("time_to_first_token", "To the first token", _WAITS)
        self.gap = self._seconds("time_between_tokens", "Between tokens of an answer", _GAPS)
        self.whole = self._seconds("request_duration", "Of a whole request", _WAITS)
        about = "Tokens of a prompt"
        self.prompt = Histogram(
            "mor_request_prompt_tokens", about, buckets=_LENGTHS, registry=self.registry
        )
        about = "Tokens of an answer"
        self.answer = Histogram(
            "mor_request_generated_tokens", about, buckets=_LENGTHS, registry=self.registry
        )
        info = Gauge("mor_info", "What is served", ("model",), registry=self.registry)
        info.labels(version).set(1)
        self.registry.register(_Engine(statistics))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)

    def _seconds(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        name, about = f"mor_{name}_seconds", f"Seconds: {about}"
        return Histogram(name, about, buckets=buckets, registry=self.registry)


class _Engine(Collector):
    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        for name, (metric, about) in _COUNTERS.items():
            yield CounterMetricFamily(f"mor_{metric}", about, value=getattr(now, name))
        for name, (metric, about) in _GAUGES.items():
            yield GaugeMetricFamily(f"mor_{metric}", about, value=getattr(now, name))
        share = now.useful_rows / now.rows if now.rows else 1.0
        about = "Share of the block's rows that had work for it, since the start"
        yield GaugeMetricFamily("mor_engine_useful_share", about, value=share)
        yield _depths(now.depth_counts)

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _depths(counts: tuple[int, ...]) -> Metric:
    """Recursions of tokens, those of prompts too. counts: tokens at depth 0, 1, ..."""
    buckets, below = [], 0
    for depth, count in enumerate(counts):
        below += count
        buckets.append((str(float(depth)), float(below)))
    total = sum(depth * count for depth, count in enumerate(counts))
    about = "Recursions that a token went through"
    family = HistogramMetricFamily("mor_token_depth", about)
    family.add_metric([], [*buckets, ("+Inf", float(below))], sum_value=float(total))
    return family
