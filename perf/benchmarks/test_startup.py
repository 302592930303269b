"""Start-up: from a model's name to the end of a first batch of 8 requests, all of it anew in every round.

`startup_s` is the whole; `load_s` is the model, `build_s` the engine (proofs, memory, compilation), and
`ready_s` what follows the model. Estimate for an H200: 2 s for the model and 2.8 s after it the first time, 6
starts of the 0.5B shape: 25 s; --quick the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from engine import Engine, EngineConfig, WorkItem, load
from perf.backends import Outcome, Setup
from perf.benchmarks.workloads import fixed
from perf.measure.case import PerfCase


class ColdStart:
    """A backend whose every run loads the model anew."""

    name = policy = "continuous"

    def missing(self, device: str) -> str | None:
        return None

    def open(self, setup: Setup) -> ColdSession:
        return ColdSession(setup)


class ColdSession:
    runner = "packed"

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        setup, began = self.setup, time.perf_counter()
        loaded = load(setup.loaded.spec, device=setup.device, dtype=setup.dtype, seed=setup.seed)
        at_load = time.perf_counter()
        engine = Engine(loaded, EngineConfig(max_batch_size=setup.max_batch_size))
        at_build = time.perf_counter()
        outputs = engine.replay(items, progress=False)
        ended = time.perf_counter()
        parts = {
            "startup_s": ended - began,
            "load_s": at_load - began,
            "build_s": at_build - at_load,
            "ready_s": ended - at_load,
        }
        return Outcome([output.token_ids for output in outputs], engine.metrics, extra=parts)

    def close(self) -> None:
        """Nothing is kept."""


def test_startup(perf_case: PerfCase, device: str) -> None:
    vocab_size = perf_case.bench.hold(device)[0].model.config.vocab_size
    info = perf_case.measure(
        "startup", ColdStart(), fixed(8, 16, 8, vocab_size), device=device, max_batch_size=8
    )
    assert info["build_s"] < info["ready_s"] < info["startup_s"]
    assert info["load_s"] + info["ready_s"] == pytest.approx(info["startup_s"])
