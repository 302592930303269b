"""A server of anybody's, asked over HTTP: at a fixed number of requests at once, or at rates of open load.

`python -m pytest --pyargs perf.benchmarks.test_server -p perf.plugin --target http://127.0.0.1:8000` measures
what is there; without `--target` it is skipped. `--model` names the model that is served, where its tokens
are to be held against ours.
"""

from __future__ import annotations

from typing import Any

from engine import EngineMetrics
from perf.gate.entries import Flat
from perf.measure.case import PerfCase
from perf.server_options import Load


def test_server(perf_case: PerfCase, device: str, server_target: Any, server_load: Load) -> None:
    rate, concurrency = server_load.rate, server_load.concurrency

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        offered = {} if rate is None else {"offered_rate": rate}
        return {**offered, **perf_case.bench.slo.of(metrics)}

    perf_case.measure(
        "server",
        "http",
        server_load.workload,
        device=device,
        max_batch_size=concurrency or 1,
        arrivals="auto" if rate is None else f"poisson:{rate}",
        options={"target": server_target},
        derive=derive,
    )
