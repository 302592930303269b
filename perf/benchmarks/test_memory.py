"""What prompts that begin alike save, and how many requests a given memory for keys and values holds.

Estimate for an H200 at 10 ms a step: 5 points of 60 to 250 steps, 6 runs each: 30 s; --quick, 3 points: 15 s.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics, kv_bytes_per_token
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


@pytest.mark.points(
    "policy", cpu=["dynamic", "continuous"], cuda=["dynamic", "continuous"], quick=["dynamic", "continuous"]
)
def test_memory(perf_case: PerfCase, device: str, policy: str) -> None:
    """Room for a third of all tokens: how many requests run at once, and how much of what they hold is not
    needed."""
    loaded, _, _ = perf_case.bench.hold(device)
    requests = 32 if perf_case.bench.real(device) else 16
    tokens = requests * 40  # of the 110 or so that a request of this workload needs at its end
    kv_memory = tokens * kv_bytes_per_token(loaded.model)

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
