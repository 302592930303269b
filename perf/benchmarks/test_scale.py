"""Model scale: the published shapes of the demonstration project, with random weights (speed does not depend
on them).

16 requests of 128 tokens in and 256 out at batch 16; beside it one such request by itself, for the speed-up,
and the bandwidth of the decode steps. On a GPU that one runs packed too, for a padded step is the model's own
forward pass, which takes the host 99 ms to launch beside an H200. Estimate for one at 0.9, 1.8, 5 and 5 ms a
step, 8 runs of 256 steps each, and 5 to 15 s to load: 70 s; --quick, the 0.5B shape: 8 s.
"""

from __future__ import annotations

import pytest

from engine import EngineMetrics
from perf.benchmarks.workloads import fixed
from perf.gate.entries import Flat
from perf.measure.case import PerfCase
from perf.measure.trial import Trial

BATCH = 16
CPU = ["random:tiny-qwen2"]
CUDA = ["random:qwen2.5-0.5b", "random:qwen2-1.5b", "random:llama-7b", "random:mistral-7b"]


@pytest.mark.points("spec", cpu=CPU, cuda=CUDA, quick=CUDA[:1])
def test_scale(perf_case: PerfCase, device: str, spec: str) -> None:
    prompt, output = (128, 256) if device == "cuda" else (16, 16)
    loaded, _, costs = perf_case.bench.hold(device, spec)
    vocab_size = loaded.model.config.vocab_size
    options = {"runner": "packed"} if device == "cuda" else {}
    alone = Trial(
        perf_case.bench,
        "scale",
        "sequential",
        fixed(1, prompt, output, vocab_size),
        device=device,
        max_batch_size=1,
        spec=spec,
        options=options,
    )
    alone.prove()
    alone.before()
    alone.run()
    alone.after()
    alone.close()
    base = alone.rounds[0].flat["tokens_per_s"]
    rate = perf_case.bench.machine_speed(device).copy_gbps

    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        share = costs.decode_bandwidth_pct(BATCH, prompt + output / 2, flat["itl_p50_ms"], rate)
        speedup = flat["tokens_per_s"] / base
        return {"sequential_tokens_per_s": base, "speedup": speedup, "decode_bandwidth_pct": share}

    perf_case.measure(
        "scale",
        "continuous",
        fixed(BATCH, prompt, output, vocab_size),
        device=device,
        max_batch_size=BATCH,
        spec=spec,
        derive=derive,
    )
