"""Latency under open load: requests come when they come, whether the engine is ready or not (Poisson
arrivals).

Every latency counts from when a request was due, so a stall is felt by all who wait (no coordinated
omission). Goodput is the requests a second that met both limits of `--slo`. Estimate for an H200: 32 requests
at 8, 16 and 32 a second take 7 s, 6 runs, and 3 s to begin each: 51 s; --quick, one rate: 15 s.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics
from perf.gate.entries import Flat
from perf.measure.case import PerfCase


@pytest.mark.points("rate", cpu=[40, 160], cuda=[8, 16, 32], quick=[16])
def test_open_load(perf_case: PerfCase, device: str, rate: int) -> None:
    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        return {"offered_rate": float(rate), **perf_case.bench.slo.of(metrics)}

    workload = "mixed-32" if perf_case.bench.real(device) else "mixed-16"
    arrivals = f"poisson:{rate}"
    perf_case.measure(
        "load", "continuous", workload, device=device, max_batch_size=32, arrivals=arrivals, derive=derive
    )
