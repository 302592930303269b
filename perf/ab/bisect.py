"""The commit that made a benchmark worse: git's bisection, driven by A/B judgements.

Every commit is judged against the good end, not against its neighbour, so that small losses add up until they
show. What is looked for are the metrics that fail between the two ends: a commit is bad if one of them fails,
good if all of them pass. The checkout stays as it is; perf/ab/history.py says how.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from perf.ab.history import Commit, History
from perf.ab.narrow import narrowed
from perf.ab.revisions import git
from perf.errors import Exit, GateError, sigterm_interrupts
from perf.gate.comparison import Comparison, Outcome, Verdict
from perf.gate.saved_runs import SHORT


class Judge(Protocol):
    """An A/B of two commits: `perf.ab.main.ab` is one. budget: seconds by the clock, all in all."""

    def __call__(self, base: str, head: str, args: Sequence[str], *, budget: float) -> Comparison: ...


class Finding(StrEnum):
    """What a judgement finds of a commit."""

    GOOD = "good"
    BAD = "bad"
    CANT_TELL = "can't tell"
    BROKEN = "broken"  # not built, not run or not comparable; or worse from before it left the good line


@dataclass(frozen=True, slots=True)
class Judgement:
    """One A/B of the good end and a commit, or why there was none.

    reason: a sentence for a person, and the end of pytest's output where that failed. comparison: with the
    verdicts on what is looked for alone. budget, seconds: what it might take, and took.
    """

    commit: Commit
    finding: Finding
    reason: str
    comparison: Comparison | None = None
    budget: float = 0.0
    seconds: float = 0.0

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return self.comparison.verdicts if self.comparison else ()

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON."""
        verdicts = self.comparison.plain()["verdicts"] if self.comparison else []
        told = {"outcome": str(self.finding), "reason": self.reason, "verdicts": verdicts}
        return {"commit": asdict(self.commit), **told, "budget": self.budget, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class Report:
    """A bisection that has ended, or was interrupted.

    wanted: what is looked for, benchmark and metric. suspects: the first bad commit is one of these, newest
    first. condemned: the judgement on the earliest commit that is bad; last_good: on the nearest before it
    that is good, None where that is the good end itself. complete: whether all was judged that can be.
    """

    good: Commit
    bad: Commit
    wanted: tuple[tuple[str, str], ...]
    suspects: tuple[Commit, ...]
    condemned: Judgement | None
    last_good: Judgement | None
    judgements: tuple[Judgement, ...]
    complete: bool

    @property
    def first_bad(self) -> Commit | None:
        """The commit that made it worse; None where several remain."""
        return self.suspects[0] if self.complete and len(self.suspects) == 1 else None

    @property
    def outcome(self) -> str:
        """`found`, `several` where those between them cannot be judged, or `interrupted`."""
        if not self.complete:
            return "interrupted"
        return "found" if self.first_bad else "several"

    @property
    def exit(self) -> Exit:
        return Exit.PASS if self.first_bad else Exit.INCONCLUSIVE

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON."""
        ends = {"good": asdict(self.good), "bad": asdict(self.bad)}
        wanted = [{"benchmark": benchmark, "metric": metric} for benchmark, metric in self.wanted]
        return {
            "outcome": self.outcome,
            **ends,
            "metrics": wanted,
            "first_bad": self.first_bad and asdict(self.first_bad),
            "suspects": [asdict(commit) for commit in self.suspects],
            "condemned": self.condemned and self.condemned.plain(),
            "last_good": self.last_good and self.last_good.plain(),
            "judgements": [judgement.plain() for judgement in self.judgements],
        }


class Bisection:
    """A search for the first bad commit; `report` says at any time how far it has come."""

    def __init__(
        self,
        good: str,
        bad: str,
        args: Sequence[str],
        judge: Judge,
        *,
        budget: float = 300.0,
        first_parent: bool = False,
        repo: Path | str = ".",
        advance: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Check the ends, and measure nothing yet.

        Args:
            good, bad: git revisions, the first an ancestor of the second; `.` is the working tree as it is.
            args: what pytest is given, from the top of the repository.
            judge: judges a commit against the good one.
            budget: seconds a judgement; twice as many where that cannot tell, once a commit.
            first_parent: take a merge for one commit, and leave alone what it merged.
            advance: called with a line about what comes next, once before each judgement.

        Raises:
            GateError: code 2, for revisions that are not there, are one, or of which the first is not an
                ancestor of the second.
        """
        top = Path(git(Path(repo), "rev-parse", "--show-toplevel"))
        self._history = History(top, good, bad, first_parent=first_parent)
        self._judge, self._budget, self.advance = judge, budget, advance
        self._whole, self._args = list(args), list(args)
        self._wanted: tuple[tuple[str, str], ...] = ()
        self._judgements: list[Judgement] = []
        self._final: dict[str, Judgement] = {}  # by commit

    @property
    def expected(self) -> int:
        """Judgements that it takes from here where each can tell: one of the ends, then half after half."""
        return (not self._judgements) + math.ceil(math.log2(len(self._history.suspects)))

    def run(self) -> Report:
        """Judge the ends, then commit after commit until one suspect is left, or none that can be judged.

        Raises:
            GateError: where the ends cannot be compared, or are not a regression: code 2 if nothing got
                worse between them, 4 if that cannot be told, 3 if they are not comparable.
            KeyboardInterrupt: on Ctrl-C or SIGTERM.
        """
        with sigterm_interrupts():
            self._judge_ends()
            while name := self._history.next():
                finding = self._judge_commit(name).finding
                if finding is Finding.GOOD:
                    self._history.clear(name)
                elif finding is Finding.BAD:
                    self._history.condemn(name)
                else:
                    self._history.skip(name)
        return self.report()

    def report(self) -> Report:
        """What is known so far."""
        history = self._history
        good = [name for name, judgement in self._final.items() if judgement.finding is Finding.GOOD]
        nearest = history.nearest(good)
        return Report(
            history.commit(history.good),
            history.commit(history.bad),
            self._wanted,
            tuple(history.commit(name) for name in history.suspects),
            self._final.get(history.worst),
            self._final[nearest] if nearest else None,
            tuple(self._judgements),
            complete=bool(self._judgements) and history.next() is None,
        )

    def _judge_ends(self) -> None:
        """Judge the bad end, and keep what fails there as what is looked for."""
        good, bad = self._history.good, self._history.bad
        pair = f"{good[:SHORT]} and {bad[:SHORT]}"
        for budget in (self._budget, 2 * self._budget):
            self.advance(f"the ends, {pair}{self._again(budget)}")
            begun = time.perf_counter()
            comparison = self._judge(good, bad, self._args, budget=budget)
            seconds = time.perf_counter() - begun
            if comparison.outcome is not Outcome.INCONCLUSIVE:
                break
        failed = [v for v in comparison.verdicts if v.outcome is Outcome.FAIL]
        if not failed:
            raise _no_regression(comparison, pair)
        self._wanted = tuple((v.benchmark, v.metric.name) for v in failed if v.metric)
        names = list(dict.fromkeys(v.benchmark for v in failed))
        self._args = narrowed(self._whole, names, self._history.top, (good, bad))
        found = replace(comparison, verdicts=tuple(failed))
        self._keep(
            Judgement(self._history.commit(bad), Finding.BAD, failed[0].reason, found, budget, seconds)
        )

    def _judge_commit(self, name: str) -> Judgement:
        """Judge a commit, and where it left the good end's history before that end, what it left with.

        A side branch from before the good end may be worse because what made the good end fast came later: it
        is no sign of a commit on that branch, unless where it began was as good as the good end.
        """
        aside = not self._history.has(name, self._history.good)
        forks = self._history.forks(name) if aside else []
        known = [self._final[fork] for fork in forks if fork in self._final]
        if any(found.finding is not Finding.GOOD for found in known):
            return self._keep(self._never_good(name, known))
        judgement = self._measure(name, self._label())
        if judgement.finding is Finding.BAD and aside:
            known = [
                self._final.get(fork) or self._measure(fork, f"where {name[:SHORT]} left") for fork in forks
            ]
            if not forks or any(found.finding is not Finding.GOOD for found in known):
                return self._keep(self._never_good(name, known))
        return judgement

    def _never_good(self, name: str, forks: Sequence[Judgement]) -> Judgement:
        fork = next((found for found in forks if found.finding is not Finding.GOOD), None)
        good = self._history.good[:SHORT]
        why = f"it shares no history with {good}"
        if fork:
            why = (
                f"it left the history of {good} at {fork.commit.short}, which is not as good: {fork.finding}"
            )
        return Judgement(self._history.commit(name), Finding.BROKEN, why)

    def _label(self) -> str:
        number = len({judgement.commit for judgement in self._judgements})  # the bad end is not counted
        return f"commit {number} of about {number - 1 + self.expected}"

    def _again(self, budget: float) -> str:
        return "" if budget == self._budget else f", again for {budget:g} s"

    def _measure(self, name: str, label: str) -> Judgement:
        """Judge a commit by itself, with twice the budget where the budget cannot tell."""
        commit = self._history.commit(name)
        for budget in (self._budget, 2 * self._budget):
            self.advance(f"{label}{self._again(budget)}: {commit.short} {commit.subject}")
            judgement = self._keep(self._compare(commit, budget))
            if judgement.finding is not Finding.CANT_TELL:
                break
        return judgement

    def _keep(self, judgement: Judgement) -> Judgement:
        self._judgements.append(judgement)
        self._final[judgement.commit.id] = judgement
        return judgement

    def _compare(self, commit: Commit, budget: float) -> Judgement:
        """Compare a commit with the good end.

        Both ends were measured with these arguments: if they are wrong here, that is the commit's doing (a
        conftest.py that cannot be imported, a benchmark that is not there), and it is skipped.
        """
        begun = time.perf_counter()
        try:
            try:
                found = self._judge(self._history.good, commit.id, self._args, budget=budget)
            except GateError as error:
                if error.code is not Exit.USAGE or self._args == self._whole:
                    raise
                found = self._judge(self._history.good, commit.id, self._whole, budget=budget)
        except GateError as error:
            seconds = time.perf_counter() - begun
            return Judgement(commit, Finding.BROKEN, str(error), None, budget, seconds)
        seconds = time.perf_counter() - begun
        finding, reason, verdicts = weigh(found, self._wanted)
        return Judgement(commit, finding, reason, replace(found, verdicts=verdicts), budget, seconds)


def weigh(
    comparison: Comparison, wanted: Sequence[tuple[str, str]]
) -> tuple[Finding, str, tuple[Verdict, ...]]:
    """Return what a comparison finds of a commit, why, and its verdicts on what is wanted."""
    given = {(v.benchmark, v.metric and v.metric.name): v for v in comparison.verdicts}
    found = [given.get((benchmark, metric)) or given.get((benchmark, None)) for benchmark, metric in wanted]
    verdicts = tuple(dict.fromkeys(verdict for verdict in found if verdict))
    gravest = next((v for outcome in Outcome for v in verdicts if v.outcome is outcome), None)
    if gravest and gravest.outcome is Outcome.FAIL:
        return Finding.BAD, gravest.reason, verdicts
    if missing := next((pair for pair, verdict in zip(wanted, found, strict=True) if not verdict), None):
        return Finding.BROKEN, f"{missing[0]} has no {missing[1]} here", verdicts
    assert gravest is not None  # what is wanted is never nothing
    finding = {Outcome.PASS: Finding.GOOD, Outcome.INCONCLUSIVE: Finding.CANT_TELL}
    return finding.get(gravest.outcome, Finding.BROKEN), gravest.reason, verdicts


def _no_regression(comparison: Comparison, pair: str) -> GateError:
    """The error that ends a search with no regression between its ends."""
    why = next((v.reason for v in comparison.verdicts if v.outcome is comparison.outcome), "nothing compared")
    if comparison.outcome is Outcome.PASS:
        text = f"nothing got worse between {pair} ({len(comparison.verdicts)} verdicts, all pass)"
        return GateError(f"{text}: there is no commit to find", Exit.USAGE)
    if comparison.outcome is Outcome.INCONCLUSIVE:
        text = f"nobody can tell whether anything got worse between {pair}: {why}; give a larger --budget"
        return GateError(text, Exit.INCONCLUSIVE)
    return GateError(f"{pair} cannot be compared: {why}", Exit.NOT_COMPARABLE)
