"""The `perf_case` fixture: one measurement, and its record on pytest-benchmark's own fixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine import Workload
from perf.backends import Backend
from perf.gate import entries, tolerances
from perf.gate.entries import Flat, plain
from perf.measure.inject_slowdown import inject_slowdown
from perf.measure.session import BenchSession
from perf.measure.trial import Trial

ROUNDS = 5
MAX_ROUNDS = 200  # that `--min-time` may become
TINY_S = 1e-9  # a clock may not have moved at all


class PerfCase:
    """The `perf_case` fixture: measures one thing and records it on pytest-benchmark's fixture.

    gate: the test's tolerances as JSON text. own: the metrics that its own marks name, each to be recorded.
    """

    def __init__(
        self, bench: BenchSession, benchmark: Any, gate: str | None, own: Collection[str] = ()
    ) -> None:
        self.bench, self.benchmark, self.gate, self.own = bench, benchmark, gate, own

    def rounds(self, rounds: int | None) -> int:
        """Return the rounds to time: `--rounds`, else what the test asks for, else the least that allows a
        verdict."""
        return self.bench.rounds or rounds or ROUNDS

    def enough_rounds(self, rounds: int | None, device: str, seconds: float) -> int:
        """Return the rounds to time where one takes so many seconds: on a CPU, where neither `--rounds` nor
        the test says how many, those that take `--min-time` (without `--quick`), and no fewer than `rounds`
        gives."""
        count = self.rounds(rounds)
        if self.bench.rounds or rounds or device != "cpu" or self.bench.quick:
            return count
        return max(count, math.ceil(min(self.bench.min_time / max(seconds, TINY_S), MAX_ROUNDS)))

    def measure(
        self,
        group: str,
        backend: str | Backend,
        workload: str | Workload,
        *,
        rounds: int | None = None,
        warmup: int = 0,
        extra: Flat | None = None,
        **how: Any,
    ) -> Flat:
        """Prove, warm up and time; return the record. `how` is that of Trial, `extra` is added as it is.

        The proof's run tells how long a round is: pytest-benchmark wants their number before it begins.

        Raises:
            InputError: if a name in `extra` is one that the record says of itself.
            GateError: if one of the test's own marks names a metric that was not recorded.
            WrongTokens: before timing, if the tokens are not the model's own.
            Unavailable: if the backend cannot run here.
        """
        entries.check_names("extra=", extra or {})
        self.benchmark.group = group  # pytest-benchmark reads it when the timing begins
        with self.unsaved_if_it_fails():
            if how["device"] == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trial = Trial(self.bench, group, backend, workload, **how)
            try:
                count = self.enough_rounds(rounds, trial.device, trial.prove())
                with inject_slowdown(self.bench.inject_slowdown):
                    self.benchmark.pedantic(
                        trial.run, setup=trial.before, teardown=trial.after, rounds=count,
                        warmup_rounds=warmup, iterations=1,
                    )  # fmt: skip
                # run once, to see that it works: pytest-benchmark skips the teardown
                if self.benchmark.disabled:
                    trial.after()
                else:
                    del trial.rounds[:warmup]
                return self.record(self.recorded(trial, extra))
            finally:
                trial.close()

    def replay(self, trial: Trial, advance: Callable[[float], None], extra: Flat | None = None) -> Flat:
        """Record a trial whose rounds were timed before, telling the clock that times the test. Raises
        InputError and GateError as `measure` does."""
        entries.check_names("extra=", extra or {})
        self.benchmark.group = trial.group
        with self.unsaved_if_it_fails():
            seconds = iter([round_.seconds for round_ in trial.rounds])

            def again() -> None:
                advance(next(seconds))

            again.replayed = True  # type: ignore[attr-defined]  # so that perf ab has no other rounds of it
            self.benchmark.pedantic(again, rounds=len(trial.rounds), iterations=1)
            return self.record(self.recorded(trial, extra))

    def recorded(self, trial: Trial, extra: Flat | None) -> Flat:
        """Return a finished trial's record, with `extra` and the test's tolerances that apply to it."""
        info = {**trial.info(), **plain(extra or {})}
        if gate := tolerances.used(self.gate, self.own, info):
            info["gate"] = gate
        return info

    @contextmanager
    def unsaved_if_it_fails(self) -> Iterator[None]:
        """Tell pytest-benchmark of a failure: it keeps a time once it is taken, whatever fails later."""
        try:
            yield
        except BaseException:
            self.benchmark.has_error = True
            raise

    def record(self, info: Flat) -> Flat:
        """Put what was recorded where pytest-benchmark saves it from, under the one key that is ours."""
        entries.write(self.benchmark.extra_info, info)
        self.bench.recorded.append(info)
        return info
