"""What a second replica brings: two engines behind Ray Serve against one, a processor each, in turns.

`python -m pytest perf/benchmarks/test_replicas.py --model smollm2`: as many requests as streams, all due at
once. Recorded are the figures of two, and how their tokens/s compare with those of one (`ratio_to_one`): the
median of pairs of rounds.
"""

from __future__ import annotations

import statistics

import pytest

from perf.backends import Unavailable
from perf.measure.case import PerfCase
from perf.measure.interleave import ReplayClock, run_peers
from perf.measure.trial import Trial

CLOCK = ReplayClock()
ONE, TWO = "ray", "ray-2"


@pytest.mark.points("streams", cpu=[8, 32], cuda=[])
@pytest.mark.benchmark(timer=CLOCK.now)
def test_replicas(perf_case: PerfCase, device: str, streams: int) -> None:
    rounds = perf_case.rounds(None if perf_case.bench.real(device) else 2)
    found = run_peers(perf_case.bench, (ONE, TWO), f"mixed-{streams}", device, streams, rounds)
    one, two = found[ONE], found[TWO]
    for trial in (one, two):
        if isinstance(trial, Unavailable):
            pytest.skip(str(trial))
        if isinstance(trial, Exception):
            raise trial
    assert isinstance(one, Trial)
    assert isinstance(two, Trial)
    pairs = zip(two.rounds, one.rounds, strict=True)
    ratios = [ours.flat["tokens_per_s"] / base.flat["tokens_per_s"] for ours, base in pairs]
    perf_case.replay(two, CLOCK.advance, {"ratio_to_one": statistics.median(ratios)})
