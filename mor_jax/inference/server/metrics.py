"""Metrics of the server and the engine, in Prometheus' text format."""

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

# Bucket bounds: seconds, seconds between tokens, tokens.
_SECONDS_BUCKETS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_TOKEN_BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

# Field of Statistics -> metric name and help text.
_COUNTERS = {
    "finished": ("engine_finished", "Sequences that finished"),
    "cancelled": ("engine_cancelled", "Sequences that were cancelled or reached their deadline"),
    "failed": ("engine_failed", "Sequences that ended with an error"),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens that were prefilled"),
    "tokens": ("generated_tokens", "Generated tokens"),
    "decode_steps": ("engine_ticks", "Decode steps"),
    "rows": ("engine_rows", "Rows of all decode steps, padding included"),
    "useful_rows": ("engine_useful_rows", "Rows that the block computed"),
    "overflows": ("cache_overflows", "Pages allocated beyond a sequence's reservation"),
    "preemptions": ("engine_preemptions", "Preempted sequences"),
    "stalls": ("cache_waits", "Rows that waited for a free page"),
    "busy_seconds": ("engine_busy_seconds", "Seconds with work to do"),
    "host_seconds": ("engine_host_seconds", "Busy seconds not spent on waiting for the device"),
    "idle_seconds": ("engine_idle_seconds", "Busy seconds in which the device had no work"),
}
_GAUGES = {
    "running": ("engine_running", "Running sequences"),
    "waiting": ("engine_waiting", "Waiting sequences"),
    "slots": ("engine_slots", "Slots: most sequences that run at a time"),
    "pages": ("cache_pages", "Pages of the cache"),
    "pages_used": ("cache_pages_used", "Allocated pages"),
    "cache_bytes": ("cache_bytes", "Bytes of all pages"),
    "used_bytes": ("cache_used_bytes", "Bytes of the allocated pages"),
    "stored_bytes": ("cache_stored_bytes", "Bytes of the stored keys and values"),
}


class ServerMetrics:
    """Metrics of the server. `render` adds the current ones of the engine."""

    def __init__(self, statistics: Callable[[], Statistics], model: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mor_http_requests", "HTTP responses", ("endpoint", "status"), registry=self.registry
        )
        self.in_progress = Gauge(
            "mor_http_requests_at_work", "Running HTTP requests", registry=self.registry
        )
        self.finish_reasons = Counter(
            "mor_choices", "Choices by finish reason", ("reason",), registry=self.registry
        )
        self.time_to_first_token = self._seconds_histogram(
            "time_to_first_token", "to the first token", _SECONDS_BUCKETS
        )
        self.time_between_tokens = self._seconds_histogram(
            "time_between_tokens", "between tokens of a choice", _GAP_BUCKETS
        )
        self.request_duration = self._seconds_histogram(
            "request_duration", "of a whole request", _SECONDS_BUCKETS
        )
        description = "Prompt tokens of a choice"
        self.prompt_tokens = Histogram(
            "mor_request_prompt_tokens", description, buckets=_TOKEN_BUCKETS, registry=self.registry
        )
        description = "Generated tokens of a choice"
        self.generated_tokens = Histogram(
            "mor_request_generated_tokens",
            description,
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        info = Gauge("mor_info", "Name of the model", ("model",), registry=self.registry)
        info.labels(model).set(1)
        self.registry.register(_EngineCollector(statistics))

    def render(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self.registry)

    def _seconds_histogram(
        self, name: str, description: str, buckets: tuple[float, ...]
    ) -> Histogram:
        name, description = f"mor_{name}_seconds", f"Seconds {description}"
        return Histogram(name, description, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        for name, (metric, description) in _COUNTERS.items():
            yield CounterMetricFamily(f"mor_{metric}", description, value=getattr(now, name))
        for name, (metric, description) in _GAUGES.items():
            yield GaugeMetricFamily(f"mor_{metric}", description, value=getattr(now, name))
        useful_share = now.useful_rows / now.rows if now.rows else 1.0
        description = "Fraction of all rows that the block computed, since the start"
        yield GaugeMetricFamily("mor_engine_useful_share", description, value=useful_share)
        yield _depth_histogram(now.depth_counts)

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _depth_histogram(counts: tuple[int, ...]) -> Metric:
    """Histogram of depths, prompt tokens included. counts: tokens at depth 0, 1, ..."""
    buckets, cumulative = [], 0
    for depth, count in enumerate(counts):
        cumulative += count
        buckets.append((str(float(depth)), float(cumulative)))
    total = sum(depth * count for depth, count in enumerate(counts))
    description = "Depth of tokens in recursions"
    histogram = HistogramMetricFamily("mor_token_depth", description)
    histogram.add_metric([], [*buckets, ("+Inf", float(cumulative))], sum_value=float(total))
    return histogram
