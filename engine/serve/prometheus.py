"""What an engine tells Prometheus, by vLLM's names, so that dashboards for vLLM show it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from engine.engine import Engine
from engine.request import RequestOutput

__all__ = ["CONTENT_TYPE", "Prometheus", "joined"]
LABEL = "model_name"
SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
TTFT = ("time_to_first_token_seconds", "From a request's arrival to its first token, ready to be sent.")
LATENCIES = {  # of a request, by the field of RequestMetrics that it is
    "latency_ms": ("e2e_request_latency_seconds", "From a request's arrival to its end."),
    "queue_ms": ("request_queue_time_seconds", "From a request's arrival to its first step."),
    "prefill_ms": ("request_prefill_time_seconds", "From a request's first step to its first token."),
    "decode_ms": ("request_decode_time_seconds", "From a request's first token to its end."),
}
LENGTHS = {
    "prompt_tokens": ("request_prompt_tokens", "Tokens of a request's prompt."),
    "output_tokens": ("request_generation_tokens", "Tokens of a request's output."),
}


class Prometheus:
    """The metrics of one engine.

    Args:
        engine: whose they are.
        name: of its model, the label of each.
        replica: which of several engines behind one address; a label too.
    """

    def __init__(self, engine: Engine, name: str, replica: str | None = None) -> None:
        labels = {LABEL: name} | ({} if replica is None else {"replica": replica})
        self._registry = CollectorRegistry()
        self._registry.register(Counted(engine, labels))

        def histogram(about: tuple[str, str], buckets: tuple[float, ...]) -> Histogram:
            kept: dict[str, Any] = {"buckets": buckets, "registry": self._registry}
            return Histogram(f"vllm:{about[0]}", about[1], list(labels), **kept).labels(**labels)

        self._ttft = histogram(TTFT, SECONDS)
        self._latencies = {field: histogram(about, SECONDS) for field, about in LATENCIES.items()}
        self._lengths = {field: histogram(about, TOKENS) for field, about in LENGTHS.items()}
        self._gaps = histogram(("inter_token_latency_seconds", "From one token to the next."), SECONDS)

    def count(self, output: RequestOutput, ttft_ms: float) -> None:
        """Add a request that has ended by itself.

        Args:
            ttft_ms: until its first token was about to be sent, which is later than the engine had it where
                the event loop has much to do: clients wait for both.
        """
        if output.metrics.ttft_ms is not None:
            self._ttft.observe(ttft_ms / 1e3)
        for field, histogram in self._latencies.items():
            if (value := getattr(output.metrics, field)) is not None:
                histogram.observe(value / 1e3)
        for field, histogram in self._lengths.items():
            histogram.observe(getattr(output.metrics, field))
        for gap in output.metrics.itl_ms:
            self._gaps.observe(gap / 1e3)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)


def joined(pages: Iterable[bytes]) -> bytes:
    """Return the pages of several engines as one: each metric once, with the series of all."""
    series: dict[str, list[str]] = {}
    for page in pages:
        for metric in page.decode().split("# HELP ")[1:]:
            about, kind, samples = metric.split("\n", 2)
            series.setdefault(f"# HELP {about}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in series.items()).encode()


class Counted(Collector):
    """What the engine counts by itself, read when it is asked for."""

    def __init__(self, engine: Engine, labels: Mapping[str, str]) -> None:
        self._engine, self._labels = engine, labels

    def collect(self) -> Iterator[Metric]:
        scheduler, metrics = self._engine.scheduler, self._engine.metrics
        names, values = list(self._labels), list(self._labels.values())
        gauges = {
            "num_requests_running": ("Requests that run.", len(scheduler.running)),
            "num_requests_waiting": ("Requests that wait.", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("Share of KV memory in use; 1 is all.", scheduler.memory.usage),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", metrics.prompt_tokens),
            "generation_tokens": ("Tokens of outputs.", metrics.tokens_delivered),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", metrics.prompt_tokens),
            "prefix_cache_hits": ("Those found there.", metrics.counters.prompt_tokens_cached),
            "num_preemptions": (
                "Requests that lost their KV memory for a while.",
                metrics.counters.preemptions,
            ),
        }
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, (about, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", about, labels=names)
            counter.add_metric(values, value)
            yield counter
        ended = CounterMetricFamily("vllm:request_success", "Requests.", labels=[*names, "finished_reason"])
        for reason, count in metrics.finish_reasons.copy().items():
            ended.add_metric([*values, reason], count)
        yield ended
