"""The course of an A/B by rounds: pairs of processes, looks, and the end of it, as soon as all is decided, or
something fails and the rest of the budget would decide no more.

An experiment is what is compared: the head as it is, or slowed down on purpose (`perf selftest`). Several can
share processes. Each benchmark has a share of the budget in each pair of processes, and within it looks at
fixed fractions; at a look everything measured so far is judged as it will be at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from perf.ab import turns
from perf.ab.groups import SIDES
from perf.ab.in_turn import InTurn
from perf.gate import tolerances
from perf.gate.comparison import Comparison, Outcome, Verdict
from perf.gate.entries import Benchmark
from perf.gate.metrics import GATED, METRICS
from perf.gate.saved_runs import Run
from perf.gate.verdict import compare

LOOKS = 8  # of a benchmark in each pair of processes
DECISIVE_PAIRS = 2  # of processes, without which nothing is decided: one may lie luckily in memory
MOST_TIMINGS = sum(not METRICS[name].is_counter for name in GATED)  # of a benchmark
LEAST_GROUPS = 2  # of a benchmark in each pair of processes, whatever is left of the budget
CONCLUDE_S = 1.0  # kept for the ends of two processes
SEED = 25  # of the order of turns
DECIDED = frozenset({Outcome.PASS, Outcome.FAIL})


@dataclass(frozen=True, slots=True)
class Plan:
    """budget_s: by the clock, start-up and proofs included. pairs: of processes. round_s: a turn's least
    time."""

    budget_s: float
    pairs: int
    round_s: float

    @property
    def looks(self) -> int:
        return self.pairs * LOOKS


@dataclass
class Experiment:
    """What is compared, and all that was measured of it.

    slowdown: that head is injected with, as text. design: has the groups. gates: head's own tolerances by
    benchmark, as JSON text. measured_s: spent in turns, by benchmark. start_up_s: of its pairs of processes,
    all that was not spent in turns. pairs: of processes that it took. replayed: benchmarks
    that take no turns.
    """

    plan: Plan
    slowdown: str | None = None
    design: InTurn = field(init=False)
    gates: dict[str, str | None] = field(default_factory=dict)
    decided: set[str] = field(default_factory=set)
    measured_s: dict[str, float] = field(default_factory=dict)
    start_up_s: float = 0.0
    pairs: int = 0
    replayed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.design = InTurn(self.plan.looks)

    @property
    def seconds(self) -> float:
        """By the clock, had nothing else shared its processes."""
        return self.start_up_s + sum(self.measured_s.values())

    def judged(self, items: Sequence[str], others: int = 0) -> Comparison:
        """Judge what was measured of some benchmarks, by their rounds alone; `others` is as for `compare`."""
        runs = [{item: self._benchmark(item, side) for item in items} for side in SIDES]
        base, head = (
            Run(name, Path(), {}, {}, "", one) for name, one in zip(("base", "head"), runs, strict=True)
        )
        return compare(base, head, design=self.design, counters=False, others=others)

    def _benchmark(self, item: str, side: int) -> Benchmark:
        rounds = self.design.series[item].rounds(side)
        return Benchmark(item, "", {}, rounds, {}, tolerances.read(item, self.gates.get(item)))

    def look(self, item: str, number: int, benchmarks: Collection[str]) -> bool:
        """Look at one of the run's benchmarks; return whether all that these processes could say is said.

        It is decided then, but for processes too few to decide anything: the next ones are to say the same.
        """
        series = self.design.series[item]
        series.look = number
        others = sum(self._timings(one) for one in benchmarks if one != item)
        verdicts = self.judged([item], others).verdicts
        enough = len(series.pairs) >= min(DECISIVE_PAIRS, self.plan.pairs)
        fails = any(verdict.outcome is Outcome.FAIL for verdict in verdicts)
        said = bool(verdicts) and all(v.outcome in DECIDED or (fails and self._futile(v)) for v in verdicts)
        if said and enough:
            self.decided.add(item)
        return said

    def _futile(self, verdict: Verdict) -> bool:
        """Return whether a metric stays undecided to the end of the plan, if it goes on as it does: it is not
        shown to be worse than allowed, and too near to that for the precision that the end will have.

        To end for futility calls nothing a regression more often (Jennison and Turnbull 2000, chapter 10).
        """
        if verdict.metric is None or verdict.tolerance is None:
            return False
        at_end = self.design.at_end(verdict.benchmark, verdict.metric.name, self.plan.pairs)
        bad = verdict.metric.bad_sign
        worst = max(bad * at_end.low, bad * at_end.high)
        return bad * at_end.log_ratio <= verdict.metric.log_limit(verdict.tolerance) < worst

    def _timings(self, item: str) -> int:
        """How many timings a benchmark has; as long as it has not been met, at most."""
        metrics = self.design.series[item].metrics
        return sum(not METRICS[name].is_counter for name in metrics) if metrics else MOST_TIMINGS


Sides = Callable[[int], AbstractContextManager[Sequence[turns.Side]]]


def run(
    sides: Sides, experiments: Sequence[Experiment], advance: Callable[[str], object], seed: int = SEED
) -> Iterator[list[Run | None]]:
    """Measure pair after pair of processes until every experiment is decided; gives what both sides saved.

    Args:
        sides: gives, for the number of a pair, how its processes are started, and looks after what they
            leave.
        advance: called with a line about each pair of processes.
    """
    rng = random.Random(seed)
    plan = experiments[0].plan
    absent: set[str] = set()  # what both have and do not measure: skipped, as on a machine without a GPU
    for number in range(plan.pairs):
        advance(f"processes {number + 1} of {plan.pairs}")
        began = turns.clock()
        with sides(number) as two, turns.pair(two, rng) as pair:
            course = _Course(number, began, set(pair.common) - absent, experiments)
            pair.run(course.wanted, course.measure, alone=number == 0)
            saved = pair.conclude()
        for experiment in experiments:
            experiment.replayed |= pair.replayed
        absent |= course.wanted - course.met
        for experiment in course.took_part:
            experiment.pairs += 1
            experiment.start_up_s += turns.clock() - began - course.measured_s
        yield saved
        if all(set(pair.common) - absent <= experiment.decided for experiment in experiments):
            return
        if number + 1 >= DECISIVE_PAIRS and all(one.seconds >= one.plan.budget_s for one in experiments):
            return


class _Course:
    """One pair of processes on their way through the benchmarks.

    wanted, met: benchmarks that they are to run, and at which both have met. measured_s: of all experiments
    together.
    """

    def __init__(
        self, number: int, began: float, benchmarks: set[str], experiments: Sequence[Experiment]
    ) -> None:
        self.number, self.began, self.benchmarks = number, began, benchmarks
        first = number % len(experiments)
        self.experiments = [*experiments[first:], *experiments[:first]]
        self.took_part = [one for one in experiments if not benchmarks <= one.decided]
        self.wanted = {name for name in benchmarks if any(name not in one.decided for one in experiments)}
        self.met: set[str] = set()
        self.measured_s = 0.0

    def measure(self, item: str, meeting: turns.Meeting) -> None:
        """Give each experiment that has not decided this benchmark its share of what is left of its
        budget."""
        self.met.add(item)
        meeting.warm_up(self.experiments[0].plan.round_s)
        started_up_s = turns.clock() - self.began - self.measured_s
        for experiment in self.experiments:
            if item in experiment.decided:
                continue
            plan = experiment.plan
            end = plan.budget_s * (self.number + 1) / plan.pairs - CONCLUDE_S
            left = self.wanted - self.met - experiment.decided
            slot = (end - experiment.seconds - started_up_s) / (1 + len(left))
            experiment.gates[item] = meeting.gate
            started = turns.clock()
            self._measure(item, meeting, experiment, started, slot)
            seconds = turns.clock() - started
            experiment.measured_s[item] = experiment.measured_s.get(item, 0.0) + seconds
            self.measured_s += seconds

    def _measure(
        self, item: str, meeting: turns.Meeting, experiment: Experiment, started: float, slot: float
    ) -> None:
        """Measure groups until a look has nothing left to wait for, or the slot is over."""
        series, round_s, looked, groups = experiment.design.series[item], experiment.plan.round_s, 0, 0
        series.pairs.append([])
        while groups < LEAST_GROUPS or turns.clock() - started < slot:
            series.add(meeting.group(round_s, experiment.slowdown))
            groups += 1
            share = min(1.0, (turns.clock() - started) / slot) if slot > 0 else 1.0
            due = int(share * LOOKS)
            if due > looked and groups >= LEAST_GROUPS:
                looked = due
                if experiment.look(item, self.number * LOOKS + due, self.benchmarks):
                    return
        if looked < LOOKS:
            experiment.look(item, (self.number + 1) * LOOKS, self.benchmarks)
