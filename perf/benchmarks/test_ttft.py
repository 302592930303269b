"""Time to the first token of prompts that come all at once.

It isolates one step of many short prompts; the warm-up rounds compile what it needs. Estimate for an H200 at
13 ms to the first tokens and 1 ms a step after it: 5 s, nearly all of it for the engine and the check of the
tokens; --quick the same.
"""

from __future__ import annotations

import pytest

from perf.benchmarks.workloads import fixed
from perf.measure.case import PerfCase

WARM_UP_ROUNDS = 3
OUTPUT = 4


@pytest.mark.points("prompts_tokens", cpu=[(4, 16)], cuda=[(32, 128)])
def test_ttft(perf_case: PerfCase, device: str, prompts_tokens: tuple[int, int]) -> None:
    prompts, tokens = prompts_tokens
    workload = fixed(prompts, tokens, OUTPUT, perf_case.bench.hold(device)[0].model.config.vocab_size)
    info = perf_case.measure(
        "ttft", "continuous", workload, device=device, max_batch_size=prompts, warmup=WARM_UP_ROUNDS
    )
    assert info["ttft_p50_ms"] == info["ttft_p95_ms"], "the prompts were computed in more than one step"
