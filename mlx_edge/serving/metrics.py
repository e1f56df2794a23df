"""What is counted, for Prometheus, in a registry of its own; and one line in the log for each request.

Counts come from the engines' listeners and survive an unloaded model; gauges are read when they are asked for.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_edge.engine.request import Completion, Request
from mlx_edge.engine.stats import EngineStats, StepRecord
from mlx_edge.profiler.memory import resident_bytes

logger = logging.getLogger(__name__)

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
GAUGES = {  # name: help, field of EngineStats
    "requests_running": ("requests that generate", "running"),
    "requests_waiting": ("requests in the queue", "waiting"),
    "batch_utilisation_ratio": ("share of the batch in use, last steps", "batch_utilisation"),
    "kv_cache_bytes": ("keys and values of running requests", "kv_bytes"),
    "prefix_cache_bytes": ("keys and values kept for shared prefixes", "prefix_bytes"),
    "memory_budget_bytes": ("what may be used", "budget_bytes"),
    "memory_reserved_bytes": ("what is promised", "reserved_bytes"),
}
StatsReader = Callable[[], dict[str, EngineStats]]


class Metrics:
    """All counters, histograms and gauges."""

    def __init__(self, read_stats: StatsReader) -> None:
        self._registry = CollectorRegistry()
        self.http_requests = self._counter(
            "http_requests", "answers by route and status", "route", "method", "status"
        )
        self.http_duration = self._histogram(
            "http_request_duration_seconds", "whole answers", LONG, "route"
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "from submission", LONG, "model"
        )
        self.inter_token = WeightedHistogram(
            "mlx_edge_inter_token_latency_seconds",
            "from a request's tokens to its next ones, for each request and step",
            SHORT,
        )
        self._registry.register(self.inter_token)
        self.duration = self._histogram(
            "request_duration_seconds", "from submission to the last token", LONG, "model"
        )
        self.queue = self._histogram("queue_seconds", "from submission to the start", LONG, "model")
        self.finished = self._counter("requests_finished", "by reason", "model", "reason")
        words = {
            "prompt_tokens": "of prompts, cached ones included",
            "generation_tokens": "generated",
            "prefix_cache_hits": "requests that found a prefix",
            "prefix_cache_misses": "requests that found none",
            "prefix_cached_tokens": "of prompts, not computed anew",
            "speculative_drafted_tokens": "drafts that were verified",
            "speculative_accepted_tokens": "drafts that were right",
        }
        self.counts = {name: self._counter(name, text, "model") for name, text in words.items()}
        self._registry.register(_Gauges(read_stats))

    def listener(self, model: str) -> "EngineListener":
        """What an engine tells its events."""
        return EngineListener(self, model)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"mlx_edge_{name}", words, labels, registry=self._registry)

    def _histogram(
        self, name: str, words: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"mlx_edge_{name}", words, labels, registry=self._registry, buckets=buckets
        )


class EngineListener:
    """Counts one model's steps and answers, in its engine's thread."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._finished, self._model = metrics.finished, model
        self._inter_token = metrics.inter_token
        self._last_step = time.monotonic()
        self._first_token = metrics.first_token.labels(model)
        self._duration = metrics.duration.labels(model)
        self._queue = metrics.queue.labels(model)
        self._counts = {name: counter.labels(model) for name, counter in metrics.counts.items()}

    def step(self, record: StepRecord) -> None:
        """All that went on got their last tokens in the step before: they waited alike."""
        now = time.monotonic()
        if record.decode_rows:
            self._inter_token.observe(self._model, now - self._last_step, record.decode_rows)
        self._last_step = now

    def finished(self, request: Request, result: Completion | Exception) -> None:
        """One request ended."""
        if isinstance(result, Exception):
            self._finished.labels(self._model, "error").inc()
            return
        self._finished.labels(self._model, result.finish_reason).inc()
        usage = result.usage
        self._queue.observe(usage.queued_s)
        self._duration.observe(usage.total_s)
        if usage.completion_tokens:
            self._first_token.observe(usage.first_token_s)
        found = "prefix_cache_hits" if usage.cached_tokens else "prefix_cache_misses"
        for name, amount in (
            ("prompt_tokens", usage.prompt_tokens),
            ("generation_tokens", usage.completion_tokens),
            ("prefix_cached_tokens", usage.cached_tokens),
            ("speculative_drafted_tokens", usage.drafted),
            ("speculative_accepted_tokens", usage.accepted),
            (found, 1),
        ):
            self._counts[name].inc(amount)


class WeightedHistogram(Collector):
    """A histogram by model that takes many equal observations at once, which prometheus-client's own does not."""

    def __init__(self, name: str, words: str, buckets: tuple[float, ...]) -> None:
        self._name, self._words, self._buckets = name, words, buckets
        self._counts: dict[str, list[int]] = {}  # by model, of each bucket and of what is over all
        self._sums: dict[str, float] = {}
        self._lock = Lock()

    def observe(self, model: str, value: float, times: int) -> None:
        """Count a value so many times. From any thread."""
        index = bisect_left(self._buckets, value)
        with self._lock:
            counts = self._counts.setdefault(model, [0] * (len(self._buckets) + 1))
            counts[index] += times
            self._sums[model] = self._sums.get(model, 0.0) + value * times

    def collect(self) -> Iterator[Metric]:
        """The family as Prometheus reads it: each bucket holds those below it too."""
        family = HistogramMetricFamily(self._name, self._words, labels=["model"])
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        with self._lock:
            for model, counts in self._counts.items():
                sums = list(zip(bounds, map(float, accumulate(counts)), strict=True))
                family.add_metric([model], sums, self._sums[model])
        yield family


class _Gauges(Collector):
    """Reads the engines' snapshots at each scrape."""

    def __init__(self, read_stats: StatsReader) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        for name, (words, attribute) in GAUGES.items():
            family = GaugeMetricFamily(f"mlx_edge_{name}", words, labels=["model"])
            for model, snapshot in stats.items():
                family.add_metric([model], float(getattr(snapshot, attribute)))
            yield family
        yield GaugeMetricFamily(
            "mlx_edge_process_memory_bytes", "resident memory", value=resident_bytes()
        )


class Watched:
    """ASGI: counts and times every answer by route, and logs a line without anything that was said."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 0, time.monotonic()

        async def send_watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        finally:
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in {"GET", "POST", "OPTIONS"} else "other"
            shown = status or "gone"
            self._metrics.http_requests.labels(route, method, shown).inc()
            self._metrics.http_duration.labels(route).observe(seconds)
            logger.info("%s %s %s %.0f ms", method, route, shown, seconds * 1000)
