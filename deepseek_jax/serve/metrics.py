"""/metrics under vLLM's names, so that dashboards made for it show this server."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_jax.serve.engine_thread import EngineThread
from deepseek_jax.serve.log import Log

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 1920.0)
_LABELS = ("model_name",)


class Metrics:
    """Of one server.

    Args:
        engine: whose state is read when it is asked for.
        model: its name, the label of all.
        log: whose lost lines are counted.
    """

    def __init__(self, engine: EngineThread, model: str, log: Log):
        self.model, self._registry = model, CollectorRegistry()
        self._registry.register(_OfServer(engine, model, log))
        made = {"registry": self._registry}
        self._prompt = Counter("vllm:prompt_tokens", "Tokens of prompts.", _LABELS, **made).labels(model)
        self._drawn = Counter("vllm:generation_tokens", "Tokens drawn.", _LABELS, **made).labels(model)
        self._success = Counter(
            "vllm:request_success", "Completions that ended.", (*_LABELS, "finished_reason"), **made
        )
        times = lambda name, text, buckets: Histogram(name, text, _LABELS, buckets=buckets, **made).labels(model)
        self._first = times("vllm:time_to_first_token_seconds", "From a call to its first token.", _TTFT)
        self._between = times("vllm:inter_token_latency_seconds", "Between tokens, a step's mean.", _BETWEEN)
        self._whole = times("vllm:e2e_request_latency_seconds", "From a call to its last token.", _WHOLE)
        self._answers = Counter("deepseek_jax:http_responses", "Answers.", (*_LABELS, "route", "status"), **made)

    def call(self) -> "Watch":
        """A call begins."""
        return Watch(self)

    def answered(self, route: str, status: int) -> None:
        """An answer was sent; `route` is one of the server's own."""
        self._answers.labels(self.model, route, str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class Watch:
    """The times of a call."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._began = metrics, time.monotonic()
        self._last: dict[int, float] = {}

    def drew(self, number: int, tokens: int, prompt_tokens: int) -> None:
        """A completion got further tokens."""
        if not tokens:
            return
        now, metrics = time.monotonic(), self._metrics
        metrics._drawn.inc(tokens)
        if number not in self._last:
            metrics._first.observe(now - self._began)
            metrics._prompt.inc(prompt_tokens)
        else:
            metrics._between.observe((now - self._last[number]) / tokens)
        self._last[number] = now

    def finished(self, reason: str) -> None:
        """A completion ended."""
        self._metrics._success.labels(self._metrics.model, reason).inc()
        self._metrics._whole.observe(time.monotonic() - self._began)

    def cancelled(self) -> None:
        """The client went away."""
        self._metrics._success.labels(self._metrics.model, "abort").inc()


class _OfServer:
    """Reads the counts of the engine and the log; integers, which may be read from any thread."""

    def __init__(self, engine: EngineThread, model: str, log: Log):
        self._thread, self._model, self._log = engine, model, log

    def collect(self) -> Iterator[Metric]:
        engine, scheduler = self._thread.engine, self._thread.engine.scheduler
        pools, done = scheduler.cache.pools, engine.metrics
        used, total = sum(pool.used for pool in pools), sum(pool.num_blocks - 1 for pool in pools)
        gauges = {
            "vllm:num_requests_running": ("Completions with a slot.", len(scheduler.running)),
            "vllm:num_requests_waiting": (
                "Completions that wait for one.",
                max(0, self._thread.live - len(scheduler.running)),
            ),
            "vllm:kv_cache_usage_perc": ("Blocks in use, of 1.", used / max(1, total)),
            "deepseek_jax:ready": ("Everything is compiled.", int(self._thread.ready)),
        }
        missed = engine.runner.compiled - self._thread.compiled if self._thread.ready else 0
        counters = {
            "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache.", done.prompted),
            "vllm:prefix_cache_hits": ("Tokens found there.", done.reused),
            "vllm:spec_decode_num_drafts": ("Passes with drafts.", done.rows if done.offered else 0),
            "vllm:spec_decode_num_draft_tokens": ("Drafts.", done.offered),
            "vllm:spec_decode_num_accepted_tokens": ("Drafts that were right.", done.accepted),
            "deepseek_jax:compile_misses": ("Programs compiled after the warm-up.", max(0, missed)),
            "deepseek_jax:log_lines_lost": ("Lines of the log that could not be written.", self._log.lost),
        }
        for family, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in found.items():
                metric = family(name, text, labels=_LABELS)
                metric.add_metric([self._model], value)
                yield metric
