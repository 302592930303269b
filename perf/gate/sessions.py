"""The design of two saved runs: sessions are what is independent, and counted.

Rounds of one process share its luck: the core it got, where its memory lies, the pace of the machine in that
minute. However many there are, they tell nothing of how another process would have fared; Kalibera and Jones
("Rigorous benchmarking in reasonable time", 2013) show that the levels of a benchmark's noise have to be
repeated each, the highest above all. MLPerf likewise counts whole runs, and asv processes.

A session's value is the trimmed mean of the logarithms of its rounds. Values of identical code vary by S^2,
a pooled variance (replicated measurements: each group around its own mean): of the sessions of both sides,
of other groups of sessions on the same machine, and of what a self-test found there (perf/gate/noise.py).
History counts as long as what is seen today does not contradict it: where the sessions of both sides vary
more than it allows (an F test), they alone are believed. log(head / base) is the difference of the means of
session values, with the error sqrt(S^2 / n_base + S^2 / n_head) and Student's t with the degrees of freedom
of S^2.

Two corrections, both to the safe side. The variance of a session's value within the session (Yuen's, inflated
for serial correlation; perf/gate/stats.py) is a floor: where its rounds vary so much that it is less sure
than S^2 says, the larger counts for that session. And where a side is a single session, half of the degrees
of freedom count, for t supposes a normal distribution, which means of several are near to and one value need
not be: on a host of two paces, one session at the rarer pace would be a false alarm in every twentieth run
(tests/perf/test_sessions.py has recorded rounds of such a host).

What it cannot see: sessions taken one straight after another share the machine's hour. Where the two sides
were measured hours apart on a machine that others use, take `perf ab`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.stats

from perf.gate import stats
from perf.gate.comparison import SESSIONS
from perf.gate.design import UndecidedError
from perf.gate.entries import Benchmark
from perf.gate.noise import Noise, Spread
from perf.gate.stats import Estimate, Mean

LEAST = 3  # sessions a side that are suggested where nothing is known
UNKNOWN = (
    "can't tell: one session a side, and this machine's noise is unknown; sessions from "
    f"python -m perf save NAME --sessions {LEAST}, or python -m perf ab, would decide"
)
CONTRADICTED = 0.05  # how unlikely today's spread must be by the history for that not to count


class BetweenSessions:
    """Sessions of one commit under one name, each a process of its own, on either side."""

    name, unit, side_by_side = SESSIONS, "sessions a side", False

    def __init__(self, noise: Noise | None = None) -> None:
        self.noise = noise or Noise()

    def count(self, before: Benchmark, after: Benchmark, metric: str) -> tuple[int, int]:
        return len(before.rounds_by_session(metric)), len(after.rounds_by_session(metric))

    def estimate(self, before: Benchmark, after: Benchmark, metric: str) -> Estimate:
        base, head = before.rounds_by_session(metric), after.rounds_by_session(metric)
        means = stats.means([*base, *head])
        sides = means[: len(base)], means[len(base) :]
        values = [[mean.value for mean in side] for side in sides]
        noise = _believed(Spread.of(values), self.noise.of(after, metric))
        if not noise.df:
            raise UndecidedError(UNKNOWN, LEAST)
        low, high = (sum(side) / len(side) for side in values)
        lone = min(len(base), len(head)) == 1
        variance, df = _error(sides, noise.variance, noise.df / 2 if lone else noise.df)
        return stats.student(high - low, math.sqrt(variance), max(1.0, df))


def _believed(today: Spread, history: Spread) -> Spread:
    """Return the noise to reckon with: all that is known, or today's alone where it contradicts the rest."""
    if not today.df or not history.df:
        return today + history
    limit = float(scipy.stats.f.ppf(1 - CONTRADICTED, today.df, history.df))
    return today if today.variance > limit * history.variance else today + history


def _error(sides: Sequence[Sequence[Mean]], noise: float, df: float) -> tuple[float, float]:
    """Return the variance of the difference of both sides' means, and its degrees of freedom.

    `noise` is the variance of a session's value, with `df`. Where a session's own is larger, that counts for
    it, and the degrees of freedom are Welch's and Satterthwaite's if those are fewer.
    """
    weighted = [(mean, 1 / len(side) ** 2) for side in sides for mean in side]
    less_sure = [(weight * mean.variance, mean.df) for mean, weight in weighted if mean.variance > noise]
    others = sum(weight * noise for mean, weight in weighted if mean.variance <= noise)
    total = others + sum(part for part, _ in less_sure)
    if not less_sure:
        return total, df
    parts = (others / total) ** 2 / df + sum((part / total) ** 2 / own for part, own in less_sure)
    return total, min(df, 1 / parts)
