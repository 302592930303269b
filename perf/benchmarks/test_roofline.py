"""Prefill alone and decode alone, each against the limit that the canary measured: matmul rate and copy
bandwidth.

Estimate for an H200: 4 lengths of prefill at under 0.2 s a run, 5 points of decode at 32 steps and a prefill,
6 runs each: 30 s; --quick, 2 and 2 points: 12 s.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics
from perf.benchmarks.workloads import fixed
from perf.gate.entries import Flat
from perf.measure.case import PerfCase
from perf.measure.costs import Costs

OUTPUT = 33


@pytest.mark.points("prompt_tokens", cpu=[64, 512], cuda=[128, 512, 2048, 8192], quick=[512, 8192])
def test_prefill(perf_case: PerfCase, device: str, prompt_tokens: int) -> None:
    """Four prompts, one after the other, each in one pass."""
    loaded, _, costs = perf_case.bench.hold(device)
    rate = perf_case.bench.machine_speed(device).matmul_gflops

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        seconds = flat["prefill_p50_ms"] / 1e3
        return {
            "prompt_tokens": prompt_tokens,
            "prefill_mfu_pct": costs.useful_flops_pct([(prompt_tokens, 1)], seconds, rate),
        }

    perf_case.measure(
        "prefill",
        "continuous",
        fixed(4, prompt_tokens, 1, loaded.model.config.vocab_size),
        device=device,
        max_batch_size=1,
        options={"max_step_tokens": max(8192, prompt_tokens)},
        derive=derive,
    )


@pytest.mark.points(
    "batch_context",
    cpu=[(1, 64), (8, 256)],
    cuda=[(1, 128), (1, 8192), (32, 512), (32, 4096), (128, 1024)],
    quick=[(1, 128), (32, 512)],
)
def test_decode(perf_case: PerfCase, device: str, batch_context: tuple[int, int]) -> None:
    """A batch that starts together; the median gap between tokens is a step of nothing but decodes."""
    batch, context = batch_context
    loaded, _, costs = perf_case.bench.hold(device)
    rate = perf_case.bench.machine_speed(device).copy_gbps

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        return {"context": context, **bandwidth(costs, batch, context, flat["itl_p50_ms"], rate)}

    workload = fixed(batch, context, OUTPUT, loaded.model.config.vocab_size)
    perf_case.measure("decode", "continuous", workload, device=device, max_batch_size=batch, derive=derive)


def bandwidth(costs: Costs, batch: int, context: int, step_ms: float, rate: float) -> Flat:
    return {"decode_bandwidth_pct": costs.decode_bandwidth_pct(batch, context + OUTPUT / 2, step_ms, rate)}
