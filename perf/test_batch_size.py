"""Throughput and latency against batch size: the demonstration project's sweep."""

from __future__ import annotations

import pytest

from perf.record import PerfCase

# CUDA: 128 tokens in and 256 out, as many requests as fit one batch, so that every step is full.
CUDA = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.points("batch_size", cpu=[1, 8], cuda=CUDA, quick=[1, 16, 128])
def test_batch_size(perf_case: PerfCase, device: str, batch_size: int) -> None:
    workload = f"paper-{batch_size}" if device == "cuda" else "mixed-16"
    info = perf_case.measure("batch_size", "continuous", workload, device=device, max_batch_size=batch_size)
    assert info["output_tokens"] > 0
