"""Steps in the history of a metric: where its level changed and stayed so. Advice, never a verdict.

Each series is of one benchmark, metric, fingerprint and identity, with a value a run. Its logarithms are cut
into segments of three runs or more such that their squares around the segments' means, plus a penalty a cut,
are least: optimal partitioning, exactly, by Jackson et al. ("An algorithm for optimal partitioning of data on
an interval", 2005), which PELT (Killick et al. 2012) prunes for series much longer than these.

The penalty is 6 log(n) noise variances. 3 log(n) is what the modified BIC of Zhang and Siegmund (2007) asks
for a place and a level; it is doubled because neighbouring runs are alike, and a lag-1 correlation of 1/3
doubles the variance of a mean. The noise is the median absolute difference of values one and two runs apart,
which steps hardly touch. A value further than two deviations from the median of the five around it is drawn
in to there, so that one bad night is no step, nor are two. asv's `step_detect.py` has the same aim; it fits
its penalty to each series, with absolute deviations as the cost.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from perf.gate import stats
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS, Metric
from perf.gate.saved_runs import SHORT, Run, is_same_code, short_commit
from perf.gate.stats import Floats
from perf.gate.tolerances import allowed

LEAST = 3  # runs of a segment
PENALTY = 6.0
OUTLIER = 2.0  # deviations from the median of its neighbourhood
NEIGHBOURHOOD = 5  # runs, of which a segment is more than half
NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
LEAST_NOISE = 0.1  # of the tolerance: no series is so quiet that a rounding is a step
COMMIT = re.compile("[0-9a-f]{7,64}")


@dataclass(frozen=True, slots=True)
class Step:
    """A change of level between two neighbouring runs of a series.

    before, after: the levels, in the metric's unit. log_ratio: log(after / before). last, first: the last run
    before it, the first after it.
    """

    benchmark: str
    metric: Metric
    before: float
    after: float
    log_ratio: float
    last: Run
    first: Run

    @property
    def change(self) -> float:
        """after / before - 1."""
        return stats.change(self.log_ratio)

    @property
    def worse(self) -> bool:
        return (self.log_ratio < 0) == (self.metric.direction == "higher")

    @property
    def commits(self) -> str:
        """The commits that were measured before and after it, as people are shown them."""
        last, first = (short_commit(run, "no commit") for run in (self.last, self.first))
        return f"{first} alone: not the code" if self._is_one_commit() else f"{last}..{first}"

    @property
    def command(self) -> str | None:
        """The command that would look for the commit, where something got worse and commits lie between.

        What comes from a file has no effect in a shell but as the name of a test.
        """
        ends = [run.commit for run in (self.last, self.first)]
        known = all(COMMIT.fullmatch(str(end.get("id"))) and not end.get("dirty") for end in ends)
        if not known or self._is_one_commit() or not self.worse or not self.benchmark.isprintable():
            return None
        good, bad = (str(end["id"])[:SHORT] for end in ends)
        return f"python -m perf bisect {good} {bad} -- {shlex.quote(self.benchmark)}"

    def _is_one_commit(self) -> bool:
        known = self.first.commit.get("id") and not self.first.commit.get("dirty")
        return bool(known) and is_same_code(self.last, self.first)


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that were found, the latest first; searched: in so many series that are long enough."""

    found: tuple[Step, ...] = ()
    searched: int = 0


NO_STEPS = Steps()


def find_steps(runs: Sequence[Run]) -> Steps:
    """The steps of all timings of the last run's benchmarks, in runs oldest first."""
    found, searched = [], 0
    for name, last in runs[-1].benchmarks.items():
        past = [(run, b) for run in runs if (b := run.benchmarks.get(name)) and is_like(b, last)]
        for metric in (METRICS[key] for key in last.rounds if not METRICS[key].is_counter):
            known = [(run, b) for run, b in past if metric.name in b.rounds]
            if len(known) >= 2 * LEAST:
                searched += 1
                found += _steps(metric, last, known)
    at = {id(run): number for number, run in enumerate(runs)}
    found.sort(key=lambda step: (-at[id(step.first)], not step.worse, -abs(step.log_ratio)))
    return Steps(tuple(found), searched)


def is_like(one: Benchmark, other: Benchmark) -> bool:
    """Return whether two results belong in one series: the same machine and the same work."""
    return one.fingerprint == other.fingerprint and one.identity() == other.identity()


def change_points(values: Floats, smallest: float) -> tuple[list[int], list[float]]:
    """The indices at which a series has another level than before, and its levels, one more.

    Args:
        values: logarithms, oldest first, 2 * LEAST or more.
        smallest: a change of level that matters, in log units; what is not larger is none.
    """
    deviation = max(noise(values), LEAST_NOISE * smallest, 1e-9)
    middle = float(np.median(values))
    tame = _tamed(values - middle, deviation)
    cuts = partition(tame, PENALTY * deviation**2 * math.log(len(values)))
    while cuts:
        steps = np.abs(np.diff(_levels(tame, cuts)))
        least = int(steps.argmin())
        if steps[least] > smallest:
            break
        del cuts[least]
    return cuts, [middle + level for level in _levels(tame, cuts)]


def noise(values: Floats) -> float:
    """The standard deviation of a series around its level, hardly touched by steps and outliers."""
    differences = [np.abs(values[lag:] - values[:-lag]) for lag in (1, 2)]
    return NORMAL * float(np.median(np.concatenate(differences))) / math.sqrt(2)


def partition(values: Floats, penalty: float) -> list[int]:
    """The begins of all segments but the first, such that the squares and a penalty a cut are least."""
    n = len(values)
    sums, squares = (np.concatenate([[0.0], np.cumsum(part)]) for part in (values, values**2))
    least = np.full(n + 1, np.inf)  # the cost of the first so many values
    least[0] = -penalty
    begins = np.zeros(n + 1, dtype=int)  # of the last segment in it
    for end in range(LEAST, n + 1):
        begin = np.arange(end - LEAST + 1)
        around = squares[end] - squares[begin] - (sums[end] - sums[begin]) ** 2 / (end - begin)
        cost = least[begin] + around + penalty
        begins[end] = int(cost.argmin())
        least[end] = cost[begins[end]]
    found = list[int]()
    at = int(begins[n])
    while at:
        found.insert(0, at)
        at = int(begins[at])
    return found


def _levels(values: Floats, cuts: Sequence[int]) -> list[float]:
    """The mean of each segment."""
    return [float(segment.mean()) for segment in np.split(values, cuts)]


def _tamed(values: Floats, deviation: float) -> Floats:
    """Values, of which outliers are drawn in to their neighbourhood (Hampel's filter)."""
    around = np.lib.stride_tricks.sliding_window_view(values, NEIGHBOURHOOD)
    middle = np.pad(np.median(around, axis=1), NEIGHBOURHOOD // 2, mode="edge")
    return np.clip(values, middle - OUTLIER * deviation, middle + OUTLIER * deviation)


def _steps(metric: Metric, like: Benchmark, known: Sequence[tuple[Run, Benchmark]]) -> list[Step]:
    values = stats.logs([stats.typical(b.rounds_by_session(metric.name)) for _, b in known])[0]
    own = like.tolerances.get(metric.name)
    smallest = allowed(metric, own, math.exp(np.median(values)))[1]
    if not math.isfinite(smallest):
        return []
    cuts, levels = change_points(values, smallest)
    return [
        Step(like.fullname, metric, math.exp(one), math.exp(two), two - one, known[cut - 1][0], known[cut][0])
        for cut, (one, two) in zip(cuts, pairwise(levels), strict=True)
    ]
