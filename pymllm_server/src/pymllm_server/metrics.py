"""Prometheus metrics, named as vLLM's where those exist: its dashboards need only another prefix."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pymllm_core.output import Delta
from pymllm_server.interface import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)


class _EngineCollector:
    """Reads the engine at each scrape: nothing to keep up to date in between."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        ready = self.engine.state == "ready"
        yield GaugeMetricFamily("pymllm:ready", "1 once the model is loaded.", value=float(ready))
        if not ready:
            return
        stats = self.engine.stats()
        used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        yield GaugeMetricFamily("pymllm:num_requests_running", "Requests being decoded.", value=stats.running)
        yield GaugeMetricFamily(
            "pymllm:num_requests_waiting", "Requests not yet admitted.", value=stats.waiting
        )
        yield GaugeMetricFamily("pymllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", value=used)
        yield GaugeMetricFamily(
            "pymllm:last_step_age_seconds", "Time since the last step.", value=stats.last_step_age_s
        )
        yield CounterMetricFamily("pymllm:prompt_tokens", "Prompt tokens taken.", value=stats.prompt_tokens)
        yield CounterMetricFamily(
            "pymllm:generation_tokens", "Tokens generated.", value=stats.generated_tokens
        )
        yield CounterMetricFamily(
            "pymllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            value=stats.cache_hit_tokens,
        )
        yield CounterMetricFamily(
            "pymllm:prefix_cache_queries", "Prompt tokens looked up there.", value=stats.prompt_tokens
        )
        yield CounterMetricFamily("pymllm:engine_steps", "Steps of the engine.", value=stats.steps)


class Metrics:
    """The registry of one server; not the process's, so that several apps may live in one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.finished = Counter(
            "pymllm:request_success", "Requests that ended.", ["finished_reason"], registry=self.registry
        )
        self.queue = self._histogram("pymllm:request_queue_time_seconds", "Waiting for admission.", _SECONDS)
        self.first = self._histogram(
            "pymllm:time_to_first_token_seconds", "Arrival to first token.", _SECONDS
        )
        self.whole = self._histogram("pymllm:e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self.token = self._histogram(
            "pymllm:time_per_output_token_seconds", "Mean per token.", _TOKEN_SECONDS
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def observe(self, delta: Delta) -> None:
        """Count a request's last delta."""
        self.finished.labels(delta.finish_reason or "abort").inc()
        timings = delta.timings
        if timings is None:
            return
        first = timings.queue_s + timings.prefill_s
        self.queue.observe(timings.queue_s)
        self.first.observe(first)
        self.whole.observe(first + timings.decode_s)
        if delta.usage.completion_tokens > 1:
            self.token.observe(timings.decode_s / (delta.usage.completion_tokens - 1))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
