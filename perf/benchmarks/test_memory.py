"""Memory for keys and values: prompts that share a beginning, room for too few requests, room for many.

On a GPU test_memory leaves dynamic out: its padded steps, the model's own forward passes, take the host 99 ms
each beside an H200, and what they hold is counted on the CPU alike. Estimate for an H200 at 1 ms a step: 3
points of 60 to 250 steps and 3 s to begin: 15 s; 512 requests at 2.9 s a run, 6 runs: 22 s; --quick leaves
those out: 8 s.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics
from perf.benchmarks.workloads import fixed
from perf.gate.entries import Flat
from perf.measure.case import PerfCase


@pytest.mark.points("caching", cpu=[False, True], cuda=[False, True], quick=[True])
def test_prefix_reuse(perf_case: PerfCase, device: str, caching: bool) -> None:
    """256 tokens in common; each run starts with an empty cache."""
    # four batches: whoever is in the first finds nothing
    requests = 32 if perf_case.bench.real(device) else 8
    info = perf_case.measure(
        "prefix",
        "continuous",
        f"shared-prefix-{requests}",
        device=device,
        max_batch_size=requests // 4,
        options={"prefix_caching": caching},
        extra={"prefix_caching": caching},
    )
    assert bool(info["prompt_tokens_cached"]) == caching


@pytest.mark.points("policy", cpu=["dynamic", "continuous"], cuda=["continuous"])
def test_memory(perf_case: PerfCase, device: str, policy: str) -> None:
    """Room for a third of all tokens: how many requests run at once, and how much of what they hold is not
    needed."""
    _, _, costs = perf_case.bench.hold(device)
    requests = 32 if perf_case.bench.real(device) else 16
    tokens = requests * 40  # of the 110 or so that a request of this workload needs at its end
    kv_memory = tokens * costs.kv_bytes

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        return {"kv_memory": kv_memory, "batch_size_max": max(metrics.counters.batch_sizes)}

    perf_case.measure(
        "memory",
        policy,
        f"mixed-{requests}",
        device=device,
        max_batch_size=requests,
        options={"kv_memory": kv_memory},
        derive=derive,
    )


@pytest.mark.points("requests_prompt_output", cpu=[(8, 8, 8)], cuda=[(512, 960, 64)], quick=[])
def test_many_requests(
    perf_case: PerfCase, device: str, requests_prompt_output: tuple[int, int, int]
) -> None:
    """So many requests that reach their whole context side by side, and none is preempted."""
    requests, prompt, output = requests_prompt_output

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        return {"batch_size_max": max(metrics.counters.batch_sizes)}

    info = perf_case.measure(
        "memory",
        "continuous",
        fixed(requests, prompt, output, perf_case.bench.hold(device)[0].model.config.vocab_size),
        device=device,
        max_batch_size=requests,
        derive=derive,
    )
    assert (info["batch_size_max"], info["preemptions"]) == (requests, 0)
