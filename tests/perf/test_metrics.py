"""The table of metrics: complete, consistent, and formatted for people."""

from __future__ import annotations

import pytest

from perf.gate.metrics import GATED, METRICS

EXACT = {name for name, metric in METRICS.items() if metric.is_counter}


def test_what_the_design_promises_is_gated_with_its_tolerance():
    promised = {
        "tokens_per_s": ("higher", 0.02, 0),
        "tpot_p50_ms": ("lower", 0.03, 0.01),
        "ttft_p50_ms": ("lower", 0.05, 0.5),
        "ttft_p95_ms": ("lower", 0.10, 0.5),
        "latency_p95_ms": ("lower", 0.10, 0.5),
        "tpot_p95_ms": ("lower", 0.05, 0.02),
        "itl_p99_ms": ("lower", 0.10, 0.1),
        "goodput": ("higher", 0.05, 0),
        "decode_bandwidth_pct": ("higher", 0.03, 0),
        "prefill_mfu_pct": ("higher", 0.03, 0),
        "startup_s": ("lower", 0.10, 0),
        "gpu_peak_bytes": ("lower", 0.01, 16 * 2**20),
        "rss_peak_bytes": ("lower", 0.03, 32 * 2**20),
    }
    assert {
        name: (METRICS[name].direction, METRICS[name].rel, METRICS[name].floor) for name in promised
    } == promised
    assert {"forward_passes", "tokens_computed", "padded_tokens", "output_tokens", "kv_bytes_peak"} <= EXACT


def test_every_metric_is_named_once_and_judged_as_its_direction_says():
    assert all(name == metric.name for name, metric in METRICS.items())
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)
    assert EXACT < set(GATED) <= set(METRICS)
    for metric in METRICS.values():
        assert metric.gated == (metric.name in GATED)
        assert (metric.rel > 0) == (metric.gated and not metric.is_counter)


@pytest.mark.parametrize(("name", "value", "text"), [
    ("tokens_per_s", 12345.6, "12,346"), ("tokens_per_s", 123.456, "123"), ("tpot_p50_ms", 1.23456, "1.23"),
    ("tpot_p50_ms", 0.0456, "0.0456"), ("forward_passes", 3579, "3,579"), ("forward_passes", 0, "0"),
    ("kv_bytes_peak", 3 * 2**19, "1.5 MiB"), ("gpu_peak_bytes", 3 * 2**29, "1.50 GiB"),
    ("goodput", None, "-"),
])  # fmt: skip
def test_values_are_formatted_for_people(name, value, text):
    assert METRICS[name].format(value) == text
