"""The demonstration project's table: 32 requests one at a time, in dynamic batches, and batched continuously.

On a GPU all three run packed, so that nothing but the policy differs, and in time: a padded step is the
model's own forward pass, which takes the host 99 ms to launch beside an H200. Estimate for one: sequential
takes 1,000 steps of 0.7 ms a run, the others 75 to 140 of 1 ms, 6 runs each and 3 s to begin: 15 s; --quick
leaves sequential out: 8 s.
"""

from __future__ import annotations

import pytest

from perf.measure.case import PerfCase

POLICIES = ["sequential", "dynamic", "continuous"]


@pytest.mark.points("policy", cpu=POLICIES, cuda=POLICIES, quick=POLICIES[1:])
def test_policy(perf_case: PerfCase, device: str, policy: str) -> None:
    workload = "mixed-32" if perf_case.bench.real(device) else "mixed-16"
    batch_size = 1 if policy == "sequential" else 16
    options = {"runner": "packed"} if device == "cuda" else {}
    perf_case.measure("policy", policy, workload, device=device, max_batch_size=batch_size, options=options)
