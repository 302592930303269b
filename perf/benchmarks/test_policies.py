"""The demonstration project's table: 32 requests one at a time, in dynamic batches, and batched continuously.

Estimate for an H200 at 10 ms a step: sequential takes 1,000 steps a run, the others 75: 6 runs each, 70 s;
--quick leaves sequential out: 10 s.
"""

from __future__ import annotations

import pytest

from perf.measure.case import PerfCase

POLICIES = ["sequential", "dynamic", "continuous"]


@pytest.mark.points("policy", cpu=POLICIES, cuda=POLICIES, quick=POLICIES[1:])
def test_policy(perf_case: PerfCase, device: str, policy: str) -> None:
    workload = "mixed-32" if perf_case.bench.real(device) else "mixed-16"
    batch_size = 1 if policy == "sequential" else 16
    perf_case.measure("policy", policy, workload, device=device, max_batch_size=batch_size)
