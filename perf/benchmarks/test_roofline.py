"""Prefill alone and decode alone, each against its measured limit: matmul rate and copy bandwidth.

Estimate for an H200 at 452,000 tokens/s of prefill and 0.7 to 2.1 ms a decode step: 12 points, each of 6 runs
under 0.4 s and 3 s to build an engine and check its tokens: 55 s; --quick, 5 points: 20 s.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics
from perf.benchmarks.workloads import fixed
from perf.gate.entries import Flat
from perf.measure.case import PerfCase
from perf.measure.costs import ModelCosts

OUTPUT = 33


@pytest.mark.points("prompt_tokens", cpu=[64, 512], cuda=[128, 512, 2048, 8192], quick=[8192])
def test_prefill(perf_case: PerfCase, device: str, prompt_tokens: int) -> None:
    """Four prompts, one after the other, each in one pass."""
    measure_prefill(perf_case, device, 4, prompt_tokens, packed=1)


@pytest.mark.points("prompts_tokens", cpu=[(4, 64)], cuda=[(8, 1024)])
def test_packed_prefill(perf_case: PerfCase, device: str, prompts_tokens: tuple[int, int]) -> None:
    """Several prompts in one pass, none of them padded and none attending to another."""
    prompts, tokens = prompts_tokens
    measure_prefill(perf_case, device, prompts, tokens, packed=prompts)


def measure_prefill(perf_case: PerfCase, device: str, prompts: int, tokens: int, packed: int) -> None:
    """Measure so many prompts, `packed` of them in a pass."""
    loaded, _, costs = perf_case.bench.hold(device)
    rate = perf_case.bench.machine_speed(device).matmul_gflops

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        seconds = flat["prefill_p50_ms"] / 1e3
        return {
            "prompt_tokens": tokens,
            "prefill_mfu_pct": costs.useful_flops_pct([(tokens, 1)] * packed, seconds, rate),
        }

    info = perf_case.measure(
        "prefill",
        "continuous",
        fixed(prompts, tokens, 1, loaded.model.config.vocab_size),
        device=device,
        max_batch_size=packed,
        options={"max_step_tokens": max(8192, tokens)},
        derive=derive,
    )
    assert info["forward_passes"] == prompts // packed


@pytest.mark.points(
    "batch_context",
    cpu=[(1, 64), (8, 256)],
    cuda=[(1, 128), (1, 512), (1, 8192), (32, 512), (32, 4096), (128, 1024), (256, 512)],
    quick=[(1, 512), (32, 512), (256, 512)],
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


def bandwidth(costs: ModelCosts, batch: int, context: int, step_ms: float, rate: float) -> Flat:
    return {"decode_bandwidth_pct": costs.decode_bandwidth_pct(batch, context + OUTPUT / 2, step_ms, rate)}
