"""Test of the gate itself: identical code and injected slowdowns, judged as `perf ab` judges two revisions.

A trial is an A/B run of every effect. Its pairs of processes are its own, and shared by the effects, each of
which has groups, looks, budget and an end of its own, and the start-up of the processes is counted to each;
so figures of one effect are those of runs that share nothing. The slowdown is injected from outside, into
head's turns alone: nothing in the engine knows of it.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.ab import experiment, sequential
from perf.ab.experiment import Experiment, Plan
from perf.ab.import_proof import environment
from perf.ab.turns import Side, turns_command
from perf.errors import Exit, GateError, sigterm_interrupts
from perf.gate import stats
from perf.gate.comparison import Comparison, Outcome
from perf.gate.design import UndecidedError
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS
from perf.gate.noise import Found, Spread
from perf.gate.pytest_process import check_args
from perf.gate.saved_runs import Run

EFFECTS = ("0", "0.03", "0.05", "0.10")
NOTHING = "0"
MINUTES = (1, 2, 5)  # budgets for which the smallest visible effect is told
SESSION_ROUNDS = 30
DEFAULT = ("perf/benchmarks/test_policies.py", "-k", "cpu-continuous")


@dataclass(frozen=True, slots=True)
class Rate:
    """Verdicts on every trial of one effect.

    outcomes, seconds: of whole runs, one a trial. failed, improved: by metric, how many trials called that
    one a regression, or better. better: trials that called any metric better.
    """

    effect: str
    budget_s: float
    outcomes: tuple[Outcome, ...]
    seconds: tuple[float, ...]
    better: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    improved: dict[str, int] = field(default_factory=dict)

    @property
    def regressions(self) -> int:
        return sum(outcome is Outcome.FAIL for outcome in self.outcomes)

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % interval (Clopper and Pearson) of the true rate of regressions called."""
        return stats.binomial_bounds(self.regressions, len(self.outcomes))

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON."""
        return {
            "effect": self.effect,
            "budget_s": self.budget_s,
            "trials": len(self.outcomes),
            "regressions": self.regressions,
            "bounds": list(self.bounds),
            "better": self.better,
            "outcomes": [str(outcome) for outcome in self.outcomes],
            "seconds": [round(seconds, 1) for seconds in self.seconds],
            "failed": self.failed,
            "improved": self.improved,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Rates, one an effect.

    visible: by metric, for each of `minutes` the slowdown that a run of so long would probably (four times in
    five) call a regression; None where that is too short for a run.
    """

    pairs: int
    rates: tuple[Rate, ...]
    visible: dict[str, tuple[float | None, ...]]
    noise: tuple[Found, ...] = ()
    asked: int = 0  # trials
    minutes: tuple[int, ...] = MINUTES

    @property
    def trials(self) -> int:
        """How many have ended."""
        return max(len(rate.outcomes) for rate in self.rates)

    def good(self, share: float) -> bool:
        """Return whether so many trials leave identical code alone, and find the largest slowdown."""
        quiet = all(r.regressions <= (1 - share) * len(r.outcomes) for r in self.rates if r.effect == NOTHING)
        slow = [rate for rate in self.rates if rate.effect != NOTHING]
        largest = max(slow, key=lambda rate: _size(rate.effect), default=None)
        return quiet and (largest is None or largest.regressions >= share * len(largest.outcomes))

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON."""
        visible = {
            name: dict(zip(map(str, self.minutes), sizes, strict=True))
            for name, sizes in self.visible.items()
        }
        return {"pairs": self.pairs, "rates": [rate.plain() for rate in self.rates], "visible": visible}


def _size(effect: str) -> float:
    """The slowdown of all steps together; 0 where only some are slowed down."""
    return float(effect) if "@" not in effect else 0.0


@dataclass(frozen=True)
class Ended:
    """One trial of one effect: its course, and what the gate said at its end."""

    course: Experiment
    comparison: Comparison


def selftest(
    effects: Sequence[str] = EFFECTS,
    trials: int = 20,
    *,
    plan: Plan,
    idle_budget_s: float | None = None,
    idle_trials: int | None = None,
    args: Sequence[str] = (),
    advance: Callable[[str], object] = lambda _: None,
) -> Report:
    """Run `trials` A/B runs of every injected effect and count what the gate calls them.

    Args:
        effects: injected slowdowns (perf/measure/slowdown.py says how they are written); 0 is identical code,
            and gives the false-alarm rate.
        plan: of each A/B run.
        idle_budget_s, idle_trials: budget and trials of identical code, if they are others; no fewer trials.
        args: pytest arguments of a benchmark of your own; by default a tiny model on the CPU.
        advance: called with a line about what comes next, once before each trial.

    Raises:
        GateError: for effects or trials that make no sense, or a process that fails.
        KeyboardInterrupt: on Ctrl-C or SIGTERM before the first trial has ended; later the report is of those
            that have.
    """
    if trials < 1:
        raise GateError(f"trials={trials} must be 1 or more", Exit.USAGE)
    asked = trials if idle_trials is None else idle_trials
    if asked < trials:
        raise GateError(f"idle_trials={asked} must be trials={trials} or more", Exit.USAGE)
    if asked > trials and NOTHING not in effects:
        raise GateError(f"idle_trials={asked} are of identical code, effect {NOTHING}", Exit.USAGE)
    if not effects or len(set(effects)) < len(effects):
        raise GateError(f"effects={list(effects)} must be different slowdowns (0.1 is 10 %)", Exit.USAGE)
    check_args(args, "process")
    idle = Plan(idle_budget_s or plan.budget_s, plan.pairs, plan.round_s)
    found: dict[str, list[Ended]] = {effect: [] for effect in effects}
    fresh: list[Run] = []
    with sigterm_interrupts():
        try:
            for number in range(asked):
                advance(f"trial {number + 1} of {asked}")
                now = effects if number < trials else [NOTHING]
                ended, processes = one_trial(now, plan, idle, args or DEFAULT, number)
                fresh += processes
                for effect, trial in zip(now, ended, strict=True):
                    found[effect].append(trial)
        except KeyboardInterrupt:
            if not fresh:
                raise
    rates = tuple(_rate(effect, some) for effect, some in found.items())
    every = [trial for some in found.values() for trial in some]
    return Report(plan.pairs, rates, _visible(every), tuple(between_processes(fresh)), asked)


def one_trial(
    effects: Sequence[str], plan: Plan, idle: Plan, args: Sequence[str], number: int
) -> tuple[list[Ended], list[Run]]:
    """One A/B run of each effect, in processes that they share; and what each process of base saved."""
    runs = [Experiment(plan, effect) if effect != NOTHING else Experiment(idle) for effect in effects]
    with tempfile.TemporaryDirectory(prefix="perf-selftest-") as folder:
        items: dict[str, None] = {}
        processes: list[Run] = []
        for base, _ in experiment.run(_here(args, Path(folder)), runs, lambda _: None, seed=number):
            items |= dict.fromkeys(item for run in runs for item in run.measured_s)
            processes += [base] if base is not None else []
    return [Ended(run, run.judged(list(items))) for run in runs], processes


def between_processes(fresh: Sequence[Run]) -> Iterator[Found]:
    """How much the values of fresh processes of one code differ, each of as many rounds as a session has."""
    values: dict[tuple[str, str], list[tuple[Benchmark, float]]] = {}
    for run in fresh:
        for name, benchmark in run.benchmarks.items():
            for metric, rounds in benchmark.rounds.items():
                if not METRICS[metric].is_counter:
                    value = stats.means([rounds[:SESSION_ROUNDS]])[0].value
                    values.setdefault((name, metric), []).append((benchmark, value))
    for (name, metric), known in values.items():
        spread = Spread.of([[value for _, value in known]])
        if spread.df:
            yield Found(name, known[0][0].fingerprint, metric, spread.variance, spread.df)


def _here(args: Sequence[str], folder: Path) -> experiment.Sides:
    """Both processes measure the tree that this one was started in."""

    @contextmanager
    def sides(number: int) -> Iterator[Sequence[Side]]:
        found = []
        for side in ("base", "head"):
            own = folder / f"{number}-{side}"
            own.mkdir()
            here = Path.cwd()
            command = turns_command(args, here, own)
            found.append(Side(f"{side}, process {number + 1}", command, here, environment(here), own))
        yield found

    return sides


def _rate(effect: str, trials: Sequence[Ended]) -> Rate:
    failed: dict[str, int] = {}
    improved: dict[str, int] = {}
    for trial in trials:
        for name, verdict in _timed(trial.comparison):
            failed[name] = failed.get(name, 0) + (verdict.outcome is Outcome.FAIL)
            improved[name] = improved.get(name, 0) + verdict.improved
    outcomes = tuple(trial.comparison.outcome for trial in trials)
    seconds = tuple(trial.course.seconds for trial in trials)
    better = sum(any(v.improved for v in trial.comparison.verdicts) for trial in trials)
    return Rate(effect, trials[0].course.plan.budget_s, outcomes, seconds, better, failed, improved)


def _timed(comparison: Comparison) -> Iterator[tuple[str, Any]]:
    """The verdicts on timings, by metric, and by benchmark where there are several."""
    several = len({verdict.benchmark for verdict in comparison.verdicts}) > 1
    for verdict in comparison.verdicts:
        if verdict.metric is not None:
            test = verdict.benchmark.rpartition("::")[2]
            yield (f"{test} {verdict.metric.name}" if several else verdict.metric.name), verdict


def _visible(trials: Sequence[Ended]) -> dict[str, tuple[float | None, ...]]:
    """By metric and budget, the smallest effect that would be seen, from what each trial says of its
    noise."""
    sizes: dict[str, list[list[float | None]]] = {}
    for trial in trials:
        for name, verdict in _timed(trial.comparison):
            sizes.setdefault(name, []).append([_smallest(trial.course, verdict, 60 * m) for m in MINUTES])
    return {name: tuple(map(_median, zip(*each, strict=True))) for name, each in sizes.items()}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if 2 * len(known) > len(values) else None


def _smallest(course: Experiment, verdict: Any, budget_s: float) -> float | None:
    """The slowdown that a run of `budget_s` of this benchmark and metric would see four times in five.

    Half an interval and 0.84 standard errors must fit between no effect and this one.
    """
    name, metric, pairs = verdict.benchmark, verdict.metric, course.plan.pairs
    groups = verdict.rounds[0]
    measuring = (budget_s - pairs * course.start_up_s / course.pairs) / len(course.measured_s)
    try:
        combined = course.design.combined(name, metric.name)
    except UndecidedError:
        return None
    if measuring <= 0:
        return None
    error = combined.error_of(groups * measuring / course.measured_s[name], pairs)
    looks = course.plan.looks
    half = sequential.estimate(0.0, error, combined.df, looks, looks).high
    return math.expm1(max(half, metric.log_limit(verdict.tolerance)) + stats.POWER_Z * error)
