"""Time to the first token of prompts that come all at once, in a server that often sees such steps.

It isolates one step of many short prompts. An engine on a GPU captures a step with chunks when its sizes have
come some times; the warm-up rounds are more than it waits for, so what is timed is a graph's replay. Estimate
for an H200 at 8 ms to the first tokens and 1 ms a step after it: 5 s, nearly all of it for the engine, the
check of the tokens and the captures; --quick the same.
"""

from __future__ import annotations

import pytest

from perf.benchmarks.workloads import fixed
from perf.measure.case import PerfCase

WARM_UP_ROUNDS = 12
OUTPUT = 4


@pytest.mark.points("prompts_tokens", cpu=[(4, 16)], cuda=[(32, 128)])
def test_ttft(perf_case: PerfCase, device: str, prompts_tokens: tuple[int, int]) -> None:
    prompts, tokens = prompts_tokens
    workload = fixed(prompts, tokens, OUTPUT, perf_case.bench.hold(device)[0].model.config.vocab_size)
    info = perf_case.measure(
        "ttft", "continuous", workload, device=device, max_batch_size=prompts, warmup=WARM_UP_ROUNDS
    )
    assert info["ttft_p50_ms"] == info["ttft_p95_ms"], "the prompts were computed in more than one step"
