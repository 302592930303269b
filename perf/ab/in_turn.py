"""The design of rounds in turn: groups of rounds from a few pairs of processes, looked at while they come.

The difference of a group is its rounds' mean log(head) less their mean log(base): what the machine did in
that tenth of a second, it did to both. Of a pair of processes the typical difference is the 20 % trimmed mean
of its groups'. A metric that is pooled (a tail percentile) is taken over as many groups as give its
percentile enough values, and these sections are then its groups.

Two processes of the same code differ by where their memory happens to lie, and more rounds do not help. So
the variance of the result has two parts: that within pairs (winsorised, pooled over them, inflated by serial
correlation), and that between pairs of processes, which few pairs tell badly: it begins at what identical
code showed (`BETWEEN`), worth `PRIOR_PAIRS` pairs of evidence, and moves with what this run's pairs show (an
inverse-gamma prior, as in Smyth 2004). Student's t has the degrees of freedom of both parts (Satterthwaite
1946). Over the looks the interval is that of perf/ab/sequential.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from perf.ab import sequential
from perf.ab.groups import SIDES, Disturbances, Group
from perf.errors import GateError
from perf.gate import stats
from perf.gate.design import too_few
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS, POOLED
from perf.gate.pooling import divided, pooled
from perf.gate.stats import Estimate, Floats

BETWEEN = 0.005  # standard deviation of log(head / base) between pairs of processes of identical code
PRIOR_PAIRS = 4
MIN_GROUPS = 6

T = TypeVar("T")
# Values of base and of head: each round's, or the one that they pool into.
Section = tuple[list[float], list[float]]


class Series:
    """All groups of one benchmark, by pair of processes.

    looks: planned, over all pairs of processes. look: the last one that it came to.
    """

    def __init__(self, looks: int) -> None:
        self.pairs: list[list[Group]] = []
        self.looks, self.look = looks, 1
        self._known: dict[object, Any] = {}  # what follows from the groups, until there are more

    def add(self, group: Group) -> None:
        """Add a group of the newest pair of processes."""
        self.pairs[-1].append(group)
        self._known.clear()

    @property
    def disturbances(self) -> Disturbances:
        return self._once(
            "disturbances", lambda: Disturbances.of([group for pair in self.pairs for group in pair])
        )

    @property
    def kept(self) -> list[list[Group]]:
        """The groups that are judged; pairs without any are left out."""
        return self._once(
            "kept", lambda: [kept for pair in self.pairs if (kept := self.disturbances.kept(pair))]
        )

    @property
    def metrics(self) -> list[str]:
        """The metrics that are judged: those that every round of both sides told, but for tails that are too
        rare."""
        return [name for name in self._told if name not in self.too_rare]

    @property
    def too_rare(self) -> list[str]:
        """The tails of which the whole plan, at this pace, has too few values.

        How many there are depends on the workload, and on neither side's times: a round of three requests has
        three values of TPOT, and no number of looks makes a P95 of them.
        """
        least = MIN_GROUPS * self.look / self.looks
        return [n for n in self._told if n in POOLED and sum(map(len, self.sections(n))) < least]

    def planned_values(self, metric: str) -> int:
        """The values a side that the whole plan, at this pace, has of a metric that is pooled."""
        groups = [group for pair in self.kept for group in pair]
        values = (sum(len(s[metric]) for group in groups for s in group.of(side)) for side in SIDES)
        return int(min(values) * self.looks / self.look)

    @property
    def _told(self) -> list[str]:
        def find() -> list[str]:
            samples = [
                sample for pair in self.pairs for group in pair for side in SIDES for sample in group.of(side)
            ]
            names = [name for name in METRICS if samples and name in samples[0]]
            return [name for name in names if all(name in sample for sample in samples)]

        return self._once("told", find)

    def sections(self, metric: str) -> list[list[Section]]:
        """Its sections by pair of processes."""
        return self._once(metric, lambda: [_sections(pair, metric) for pair in self.kept])

    def rounds(self, side: int) -> dict[str, tuple[float, ...]]:
        """The values of one side by metric: each round's, or each section's of a pooled one."""
        return {
            name: tuple(value for pair in self.sections(name) for section in pair for value in section[side])
            for name in self.metrics
        }

    def _once(self, key: object, find: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = find()
        return cast(T, self._known[key])


class InTurn:
    """Judges each benchmark at the look that it is at.

    looks: planned for each benchmark, over all pairs of processes.
    """

    name, unit, side_by_side = "rounds in turn", "groups of rounds", True

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.series: defaultdict[str, Series] = defaultdict(lambda: Series(looks))

    def count(self, before: Benchmark, after: Benchmark, metric: str) -> tuple[int, int]:
        groups = sum(map(len, self.series[before.fullname].sections(metric)))
        return groups, groups

    def estimate(self, before: Benchmark, after: Benchmark, metric: str) -> Estimate:
        series = self.series[before.fullname]
        if metric not in series.metrics:
            raise GateError("was not told round by round: measure it with --interleave blocks")
        one = self.combined(before.fullname, metric)
        fixed = min(one.error**2, one.between / sum(map(bool, series.sections(metric))))
        return sequential.estimate(one.log_ratio, one.error, one.df, series.look, self.looks, fixed)

    def at_end(self, benchmark: str, metric: str, pairs: int) -> Estimate:
        """What the last look would probably say, if all goes on as it did: the same difference, from as many
        groups more as there are looks left, in so many pairs of processes. Raises UndecidedError for too few
        so far."""
        series, one = self.series[benchmark], self.combined(benchmark, metric)
        groups = sum(map(len, series.sections(metric))) * self.looks / series.look
        error = one.error_of(groups, pairs)
        return sequential.estimate(one.log_ratio, error, one.df, self.looks, self.looks)

    def combined(self, benchmark: str, metric: str) -> Combined:
        """What all groups of a benchmark say of a metric. Raises UndecidedError for too few."""
        sections = self.series[benchmark].sections(metric)
        pairs = [np.array(list(_differences(pair))) for pair in sections if pair]
        groups = sum(map(len, pairs))
        if groups < MIN_GROUPS:
            raise too_few((groups, groups), self.unit, MIN_GROUPS)
        return combine(pairs)


@dataclass(frozen=True, slots=True)
class Combined:
    """The typical difference over pairs of processes.

    error, df: of it. within: variance of the typical difference of one group. between: of one pair of
    processes.
    """

    log_ratio: float
    error: float
    df: float
    within: float
    between: float

    def error_of(self, groups: float, pairs: int) -> float:
        """The standard error that so many groups from so many pairs would probably have."""
        return math.sqrt(self.within / groups + self.between / pairs)


def combine(pairs: Sequence[Floats]) -> Combined:
    """Combine the differences of each pair's groups, log units; one or more a pair, MIN_GROUPS or more in
    all."""
    cuts = [int(stats.TRIM * len(pair)) for pair in pairs]
    kept = np.array([len(pair) - 2 * cut for pair, cut in zip(pairs, cuts, strict=True)], float)
    clipped = [stats.winsorised(pair, cut) for pair, cut in zip(pairs, cuts, strict=True)]
    means = np.array([stats.trimmed(pair, cut)[0] for pair, cut in zip(pairs, cuts, strict=True)])
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in clipped)
    df_within = max(1.0, float((kept - 1).sum()))
    of_one = squares / df_within * stats.inflation(clipped)
    within = of_one / kept
    between = float(PRIOR_PAIRS * BETWEEN**2)
    if len(pairs) > 1:
        between += (len(pairs) - 1) * max(0.0, float(means.var(ddof=1) - within.mean()))
    df_between = PRIOR_PAIRS + len(pairs) - 1
    between /= df_between
    weights = 1 / (within + between)
    variance = float(1 / weights.sum())
    part = min(variance, between / len(pairs))
    df = variance**2 / (part**2 / df_between + (variance - part) ** 2 / df_within)
    share = sum(map(len, pairs)) / float(kept.sum())
    return Combined(float(weights @ means / weights.sum()), math.sqrt(variance), df, of_one * share, between)


def _sections(groups: Sequence[Group], metric: str) -> list[Section]:
    """The values of each group of a pair, or of as many together as give a pooled metric enough on both
    sides."""
    q, needed = METRICS[metric].pooled, METRICS[metric].needed_n
    told = [[[sample[metric] for sample in group.of(side)] for side in SIDES] for group in groups]
    if q is None:
        return [(base, head) for base, head in told]

    def full(section: Sequence[Any]) -> bool:
        counts = [sum(len(values) for both in section for values in both[side]) for side in SIDES]
        return min(counts) >= needed

    joined = [section for section in divided(told, full) if full(section)]
    sides = ([[values for both in section for values in both[side]] for side in SIDES] for section in joined)
    return [([pooled(base, q)], [pooled(head, q)]) for base, head in sides]


def _differences(sections: Sequence[Section]) -> Iterator[float]:
    """log(head / base) of each section of a pair's groups."""
    sides = stats.logs(*(side for section in sections for side in section))
    for base, head in zip(sides[::2], sides[1::2], strict=True):
        yield float(head.mean() - base.mean())


def tell_too_rare(benchmark: str, series: Series) -> Iterator[str]:
    """What a reader should know of the tails that were not judged."""
    for name in series.too_rare:
        values, needed = series.planned_values(name), MIN_GROUPS * METRICS[name].needed_n
        what = f"a tail of about {values:,} values a side; it needs {needed:,}"
        yield f"{benchmark}: {METRICS[name].label} is not judged: {what}"


def tell_disturbances(found: Mapping[str, Disturbances]) -> Iterator[str]:
    """What a reader should know of the groups that were left out, or would have been."""
    for benchmark, one in found.items():
        if not one.spoiled:
            continue
        what = ", ".join(f"{count} by {why}" for why, count in one.spoiled.items())
        left = f"{sum(one.spoiled.values())} of {one.groups} groups of rounds"
        took = f"{left} ({what}), {one.share:.0%} of its time"
        end = f", and judged all the same: {one.why_kept}" if one.why_kept else ", and left out"
        yield f"{benchmark}: the machine took {took}{end}"
