"""Model scale: the published shapes of the demonstration project, with random weights (speed does not depend
on them).

16 requests of 128 tokens in and 256 out at batch 16; beside it one such request by itself, for the speed-up.
Estimate for an H200 at 10 to 14 ms a step: 1.5B 26 s, 7B twice 41 s, loading included: 108 s; --quick leaves
all out.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics
from perf.gate.entries import Flat
from perf.measure.case import PerfCase
from perf.measure.trial import Trial

CPU = ["random:tiny-qwen2"]
CUDA = ["random:qwen2-1.5b", "random:llama-7b", "random:mistral-7b"]  # the 0.5B shape is what all others run


@pytest.mark.points("spec", cpu=CPU, cuda=CUDA, quick=[])
def test_scale(perf_case: PerfCase, device: str, spec: str) -> None:
    workloads = ("paper-16", "paper-1") if device == "cuda" else ("mixed-8", "mixed-1")
    alone = Trial(
        perf_case.bench, "scale", "sequential", workloads[1], device=device, max_batch_size=1, spec=spec
    )
    alone.prove()
    alone.before()
    alone.run()
    alone.after()
    alone.close()
    base = alone.rounds[0].flat["tokens_per_s"]

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        return {"sequential_tokens_per_s": base, "speedup": flat["tokens_per_s"] / base}

    perf_case.measure(
        "scale", "continuous", workloads[0], device=device, max_batch_size=16, spec=spec, derive=derive
    )
