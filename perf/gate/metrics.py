"""The one table of metrics: names, units, which way is better, and how much change is too much.

A leaf: no measuring, no statistics, no imports of the project. A metric that is not gated is shown and never
judged.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "exact"]
MIB = float(2**20)
MOST = sys.float_info.max
TIME = "round_s"  # all that a benchmark records which knows nothing of this project


BEYOND = 10  # values beyond a percentile, without which one of them alone would be the figure


def needed_values(quantile: float) -> int:
    """Return how many values a quantile of a tail needs, so that BEYOND of them lie beyond it."""
    return math.ceil(round(BEYOND / (1 - quantile), 6))  # 1 - 0.9 is a little less than 0.1


def is_amount(value: object) -> bool:
    """Return whether a value is a finite number of 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a benchmark.

    direction: which way is better; "exact" allows no change at all. rel: the fraction of the baseline's value
    by which it may get worse. floor: a change smaller than this, in the metric's own unit, is never a
    regression. gated: whether the gate judges it. zero: whether 0 is a value that it can have; 0 s is of a
    clock that stood still. pooled: the quantile that it is, if it is one of the values of several rounds
    together; None for a metric of which each round has a value of its own.
    """

    name: str
    label: str
    unit: str
    direction: Direction
    rel: float = 0.0
    floor: float = 0.0
    gated: bool = True
    zero: bool = False
    pooled: float | None = None

    @property
    def needed_n(self) -> int:
        """The values that a sample of it needs: 1, and for a pooled one ten beyond its percentile.

        MLPerf's loadgen likewise takes a tail percentile of enough queries only: with fewer, P99 is the
        largest value or a mean of the two largest, and says more about one hiccup of the machine than about
        the code.
        """
        return 1 if self.pooled is None else needed_values(self.pooled)

    @property
    def is_counter(self) -> bool:
        """Whether it depends on the code alone, so that no change at all is allowed."""
        return self.direction == "exact"

    @property
    def bad_sign(self) -> int:
        """The sign of log(head / base) of what got worse."""
        return -1 if self.direction == "higher" else 1

    def unfit(self, value: object) -> str | None:
        """The fault of a recorded value, or None: it must be finite, and above 0 but for `zero`."""
        least = "of 0 or more" if self.zero else "above 0"
        return None if is_amount(value) and (value or self.zero) else f"is not a finite number {least}"

    def log_limit(self, tolerance: float) -> float:
        """The log-ratio, on the bad side, that getting worse by a fraction of `tolerance` is."""
        if self.direction == "higher":
            return -math.log1p(-tolerance) if tolerance < 1 else math.inf
        return math.log1p(tolerance)

    def format(self, value: float | None) -> str:
        """The value for a person, without its unit unless that is bytes: `1,234`, `12.3`, `1.5 GiB`."""
        if value is None:
            return "-"
        if self.unit == "bytes":
            return f"{value / MIB:,.1f} MiB" if abs(value) < 1024 * MIB else f"{value / MIB / 1024:,.2f} GiB"
        if self.is_counter or (float(value).is_integer() and abs(value) >= 100):
            return f"{value:,.0f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _timed(name: str, label: str, rel: float, floor: float, pooled: float | None = None) -> Metric:
    return Metric(name, label, "ms", "lower", rel, floor, pooled=pooled)


def _count(name: str, label: str, unit: str = "") -> Metric:
    return Metric(name, label, unit, "exact", zero=True)


def _shown(name: str, label: str, unit: str, direction: Direction = "lower") -> Metric:
    return Metric(name, label, unit, direction, gated=False)


_GATED = (
    Metric("tokens_per_s", "tokens/s", "tok/s", "higher", 0.02),
    _timed("tpot_p50_ms", "TPOT P50", 0.03, 0.01),
    _timed("ttft_p50_ms", "TTFT P50", 0.05, 0.5),
    _timed("ttft_p95_ms", "TTFT P95", 0.10, 0.5),
    _timed("latency_p95_ms", "latency P95", 0.10, 0.5),
    _timed("tpot_p95_ms", "TPOT P95", 0.05, 0.02, pooled=0.95),
    _timed("itl_p99_ms", "ITL P99", 0.10, 0.1, pooled=0.99),
    Metric("goodput", "goodput", "req/s", "higher", 0.05, zero=True),
    Metric("rate_within_limits", "rate within the limits", "req/s", "higher", 0.10, zero=True),
    Metric("decode_bandwidth_pct", "decode bandwidth", "%", "higher", 0.03),
    Metric("prefill_mfu_pct", "prefill MFU", "%", "higher", 0.03),
    Metric("startup_s", "start-up", "s", "lower", 0.10),
    Metric("gpu_peak_bytes", "peak GPU memory", "bytes", "lower", 0.01, 16 * MIB, zero=True),
    Metric("rss_peak_bytes", "peak host memory", "bytes", "lower", 0.03, 32 * MIB),
    Metric(TIME, "round time", "s", "lower", 0.05),
    _count("forward_passes", "forward passes"),
    _count("tokens_computed", "tokens computed"),
    _count("padded_tokens", "padded tokens"),
    _count("prompt_tokens_cached", "prompt tokens cached"),
    _count("output_tokens", "output tokens"),
    _count("preemptions", "preemptions"),
    _count("kv_bytes_peak", "peak KV", "bytes"),
)
_SHOWN = (
    _shown("ttft_p99_ms", "TTFT P99", "ms"),
    _shown("tpot_p99_ms", "TPOT P99", "ms"),
    *(_shown(f"itl_{p}_ms", f"ITL {p.upper()}", "ms") for p in ("p50", "p95")),
    *(_shown(f"latency_{p}_ms", f"latency {p.upper()}", "ms") for p in ("p50", "p99")),
    _shown("prefill_mean_ms", "prefill mean", "ms"),
    _shown("decode_mean_ms", "decode mean", "ms"),
    _shown("queue_mean_ms", "queue mean", "ms"),
    _shown("wall_s", "wall time", "s"),
    _shown("host_pct", "host work", "%"),
    _shown("padding_ratio", "padding ratio", ""),
    _shown("batch_size_mean", "mean batch size", "", "higher"),
    _shown("offered_rate", "offered load", "req/s", "higher"),
    _shown("slo_met_pct", "requests within the limits", "%", "higher"),
    _shown("steady_requests", "requests of the steady part", "", "higher"),
    _shown("steady_offered_rate", "offered in the steady part", "req/s", "higher"),
    _shown("steady_ended_rate", "ended in the steady part", "req/s", "higher"),
    _shown("steady_ttft_p95_ms", "TTFT P95 of the steady part", "ms"),
    _shown("send_lag_p99_ms", "send lag P99", "ms"),
    _shown("ended_early", "requests that ended early", ""),
    _shown("server_queue_mean_ms", "the server's queue, mean", "ms"),
    _shown("server_preemptions", "the server's preemptions", ""),
    _shown("server_prefix_hits", "tokens in the server's prefix cache", ""),
    _shown("server_prefix_queries", "tokens looked up there", ""),
    _shown("server_decode_calls", "the server's decode calls", ""),
    _shown("gpu_util_pct", "GPU utilisation", "%", "higher"),
    _shown("gpu_energy_j", "GPU energy", "J"),
    _shown("decode_util_pct", "GPU utilisation of decode", "%", "higher"),
    _shown("idle_pct", "time between kernels", "%"),
    _shown("longest_gap_us", "longest gap between kernels", "us"),
    _shown("kernels_per_step", "kernels a step", ""),
    _shown("load_s", "loading the model", "s"),
    _shown("ready_s", "from a loaded model to a first batch", "s"),
    _shown("useful_flops_pct", "useful FLOPs", "%", "higher"),
    _shown("same_tokens", "requests with the very same tokens", "", "higher"),
    _shown("http_ttft_ms", "TTFT over the engine's", "ms"),
    _shown("near_ties", "requests that part at a near-tie", ""),
    _shown("checked_requests", "requests checked", "", "higher"),
    _shown("canary_matmul_gflops", "canary matmul", "GFLOP/s", "higher"),
    _shown("canary_copy_gbps", "canary copy", "GB/s", "higher"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_GATED, *_SHOWN)}
POOLED = {metric.name: metric.pooled for metric in _GATED if metric.pooled is not None}
GATED: tuple[str, ...] = tuple(metric.name for metric in _GATED)
