"""Summaries that aiperf and genai-perf share, the one being the other's heir: of each metric its statistics,
and beside them a file of records."""

from __future__ import annotations

import math

from perf.importers.fields import Fields

UNITS = {
    "output_token_throughput": "tokens/sec",
    "time_to_first_token": "ms",
    "inter_token_latency": "ms",
    "request_latency": "ms",
}
SUMMARIES = {
    "output_token_throughput.avg": "tokens_per_s",
    "time_to_first_token.p50": "ttft_p50_ms",
    "time_to_first_token.p95": "ttft_p95_ms",
    "inter_token_latency.p50": "tpot_p50_ms",
    "request_latency.p95": "latency_p95_ms",
    "time_to_first_token.avg": "ttft_mean_ms",
    "time_to_first_token.p99": "ttft_p99_ms",
    "inter_token_latency.avg": "tpot_mean_ms",
    "inter_token_latency.p99": "tpot_p99_ms",
    "request_latency.avg": "latency_mean_ms",
    "request_latency.p50": "latency_p50_ms",
    "request_latency.p99": "latency_p99_ms",
}
TPOT = "TPOT is what the tool calls inter token latency: decode time / (output tokens - 1) of each request"


def statistics(found: Fields) -> Fields:
    """The statistics that we have a name for, each under METRIC.STATISTIC.

    Raises:
        GateError: if a metric is missing, as where nothing was streamed, or in another unit.
    """
    values: dict[str, object] = {}
    for metric, unit in UNITS.items():
        one = found.inner(metric)
        if (other := one.text("unit")) != unit:
            raise one.refuse(f"is in {other}, where {unit} is what is known here")
        values |= {f"{metric}.{name}": value for name, value in one.data.items()}
    return Fields(found.path, values, found.where)


def seconds(found: Fields, tokens: int) -> float:
    """The time in which so many tokens came at the throughput that is stated."""
    throughput = found.inner("output_token_throughput").number("avg")
    if not throughput:
        raise found.refuse("its output token throughput is 0: nothing was measured")
    return tokens / throughput


def average(found: Fields, metric: str) -> int:
    """A count, which stands as the average of a metric."""
    value = found.inner(metric).number("avg")
    if not value.is_integer():
        raise found.refuse(f"{metric!r} is {value}, which is no count")
    return int(value)


def check_same_run(found: Fields, ttft_mean_ms: float, beside: str) -> None:
    """Raise GateError unless the records in a file beside a summary are of the same run."""
    stated = found.inner("time_to_first_token").number("avg")
    if not math.isclose(stated, ttft_mean_ms, rel_tol=1e-6):
        other = f"mean TTFT {ttft_mean_ms:.3f} ms, not {stated:.3f}"
        raise found.refuse(
            f"{beside} beside it is of another run ({other}): keep the files of a run together"
        )
