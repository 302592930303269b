"""What HTTP costs: the engine behind its own server against the engine in process, in turns.

`python -m pytest perf/benchmarks/test_serve.py --model smollm2`: as many requests as streams, all due at
once. Recorded are the server's figures, how its tokens/s compare with the engine's (`ratio_to_engine`), and
by how much its TTFT is longer (`http_ttft_ms`), each the median of pairs of rounds.
"""

from __future__ import annotations

import statistics

import pytest

from perf.backends import Unavailable
from perf.measure.case import PerfCase
from perf.measure.interleave import ReplayClock, run_peers
from perf.measure.trial import Trial

CLOCK = ReplayClock()
ENGINE, SERVER = "continuous", "serve"


@pytest.mark.points("streams", cpu=[1, 8, 32], cuda=[])
@pytest.mark.benchmark(timer=CLOCK.now)
def test_serve(perf_case: PerfCase, device: str, streams: int) -> None:
    rounds = perf_case.rounds(None if perf_case.bench.real(device) else 2)
    found = run_peers(perf_case.bench, (ENGINE, SERVER), f"mixed-{streams}", device, streams, rounds)
    engine, server = found[ENGINE], found[SERVER]
    if isinstance(server, Unavailable):
        pytest.skip(str(server))
    for trial in (engine, server):
        if isinstance(trial, Exception):
            raise trial
    assert isinstance(engine, Trial)
    assert isinstance(server, Trial)
    pairs = [(ours.flat, base.flat) for ours, base in zip(server.rounds, engine.rounds, strict=True)]
    ratio = statistics.median(ours["tokens_per_s"] / base["tokens_per_s"] for ours, base in pairs)
    later = statistics.median(ours["ttft_p50_ms"] - base["ttft_p50_ms"] for ours, base in pairs)
    perf_case.replay(server, CLOCK.advance, {"ratio_to_engine": ratio, "http_ttft_ms": later})
