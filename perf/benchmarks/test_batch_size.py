"""Throughput and latency against batch size: the demonstration project's sweep, 128 tokens in and 256 out.

On CUDA there are as many requests as fit one batch, so that every step is full. Estimate for an H200 at 0.7
to 2.1 ms a step: 9 sizes x ((1 + 5 runs) x 256 steps + 3 s to build an engine and check its tokens) = 45 s;
--quick, 3 sizes: 15 s.
"""

from __future__ import annotations

import pytest

from perf.measure.case import PerfCase


@pytest.mark.points("batch_size", cpu=[1, 8], cuda=[1, 2, 4, 8, 16, 32, 64, 128, 256], quick=[1, 16, 128])
def test_batch_size(perf_case: PerfCase, device: str, batch_size: int) -> None:
    workload = f"paper-{batch_size}" if perf_case.bench.real(device) else "mixed-8"
    perf_case.measure("batch_size", "continuous", workload, device=device, max_batch_size=batch_size)
