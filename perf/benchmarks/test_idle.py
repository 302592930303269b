"""Decoding, and how busy it keeps a GPU: time between kernels, each kernel's, and NVML's utilisation.

It isolates the host: a step that it launches too late is a gap. The rounds are timed as always; the gaps are
of 40 steps more, traced, and the utilisation of 2 s more from 4,200 positions on, where no graph is captured
on the way. Neither is gated. `--perf-trace FOLDER` keeps the traces, and a table of each one's kernels.
Estimate for an H200: 10 s each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import Engine, EngineConfig, max_positions
from perf.benchmarks.workloads import fixed
from perf.gate.entries import Flat
from perf.measure.case import PerfCase
from perf.measure.idle import decoding, idle_time, utilisation
from perf.measure.session import free

OUTPUT = 65
LONG_PROMPT, MOST_OUTPUT = 4200, 8000  # of requests that decode for as long as NVML is read


@pytest.mark.points("requests", cpu=[3], cuda=[1, 32, 256])
def test_idle(request: pytest.FixtureRequest, perf_case: PerfCase, device: str, requests: int) -> None:
    vocab_size = perf_case.bench.hold(device)[0].model.config.vocab_size
    context = 512 if device == "cuda" else 16
    folder: Path | None = request.config.getoption("--perf-trace")
    watched = watch(
        perf_case, device, requests, context, folder and folder / f"idle-{device}-{requests}.json"
    )
    workload = fixed(requests, context, OUTPUT, vocab_size)
    perf_case.measure("idle", "continuous", workload, device=device, max_batch_size=requests, extra=watched)


def watch(perf_case: PerfCase, device: str, requests: int, context: int, trace: Path | None) -> Flat:
    """Return the figures of one engine that decodes so many requests, first traced and then read by NVML."""
    loaded, _, _ = perf_case.bench.hold(device)
    vocab_size, most = loaded.model.config.vocab_size, max_positions(loaded.model.config)
    real = device == "cuda"
    prompt, settle_s, seconds = (min(LONG_PROMPT, most // 2), 1.0, 2.0) if real else (context, 0.0, 0.0)
    config = EngineConfig(max_batch_size=requests, prefix_caching=False, generation_config="none")
    engine = Engine(loaded, config)
    with decoding(engine, fixed(requests, context, 100, vocab_size).items):
        found = idle_time(engine, device, trace)
    with decoding(engine, fixed(requests, prompt, min(MOST_OUTPUT, most - prompt), vocab_size).items):
        reading = utilisation(engine, device, settle_s, seconds)
    del engine  # its memory, which is most of what is free, before the timed one asks for it
    free()
    return {**found, "decode_util_pct": reading.util_pct, "decode_util_reason": reading.reason}
