"""Benchmarks that take turns: A B C, C B A, ..., so that a machine that drifts drifts for all of them.

pytest-benchmark times a test while it runs; these are timed together, before any of their tests, and then
replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perf.measure.inject_slowdown import inject_slowdown
from perf.measure.session import BenchSession
from perf.measure.trial import Trial

# Peers are open at the same time and share the memory, so none may take most of it. Speed does not depend on
# it.
PEER_OPTIONS: dict[str, dict[str, Any]] = {
    **{policy: {"kv_memory": 0.2} for policy in ("sequential", "dynamic", "continuous")},
    "transformers-cb": {"max_memory_percent": 0.1},
    "vllm": {"gpu_memory_utilization": 0.3},
}


class ReplayClock:
    """A clock that stands still but for what it is told: rounds timed elsewhere become pytest-benchmark's
    own.

    Benchmarks that must take turns (A B C, C B A, ...) cannot each be timed while their own test runs.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def advance(self, seconds: float) -> None:
        """Let this much time pass."""
        self._seconds += seconds

    def now(self) -> float:
        """Return the seconds that it was told of; pytest-benchmark calls this."""
        return self._seconds


def interleave(trials: Sequence[Trial], rounds: int) -> dict[str, Exception]:
    """Time every trial once a round, in an order that turns round each time, so that a drifting machine
    drifts for all.

    A trial that fails is left out of the following rounds; return its error by the backend's name.
    """
    failed: dict[str, Exception] = {}
    for number in range(rounds):
        for trial in trials if number % 2 == 0 else reversed(trials):
            if trial.backend.name in failed:
                continue
            try:
                trial.time_round()
            except Exception as error:
                failed[trial.backend.name] = error
    return failed


def run_peers(
    bench: BenchSession, names: Sequence[str], workload: str, device: str, batch_size: int, rounds: int
) -> dict[str, Trial | Exception]:
    """Open all, prove all, then time all in turns and close them; return a trial for each name, or why there
    is none."""
    found: dict[str, Trial | Exception] = {}
    for name in names:
        try:
            how: dict[str, Any] = {"max_batch_size": batch_size, "options": PEER_OPTIONS.get(name, {})}
            trial = Trial(bench, "peers", name, workload, device=device, **how)
            found[name] = trial
            try:
                trial.prove()
            except BaseException:
                trial.close()
                raise
        except Exception as error:
            found[name] = error
    trials = {name: trial for name, trial in found.items() if isinstance(trial, Trial)}
    with inject_slowdown(bench.inject_slowdown):
        failed = interleave(list(trials.values()), rounds)
    for name, trial in trials.items():
        trial.close()
        found[name] = failed.get(trial.backend.name, trial)
    return found
