"""The gate: two runs in, a verdict a metric and an exit code out.

Statistics are in perf/stats.py, rendering in perf/report; nothing here measures or prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from perf.metrics import Metric
from perf.runs import Exit, Run


class Outcome(StrEnum):
    """What is said of one metric, of one benchmark or of a whole comparison; in order of rank, gravest first."""

    FAIL = "FAIL"
    ERROR = "ERROR"  # should have been compared and could not be
    INCONCLUSIVE = "INCONCLUSIVE"
    PASS = "PASS"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One metric of one benchmark.

    base, head: typical values over rounds. effect: head / base - 1, signed as measured (+0.10 is 10 % more, whatever is
    better); low, high: its 95 % interval. tolerance: by how much it may get worse, a fraction, the floor included.
    improved: surely and noticeably better. rounds: of base and head. rounds_needed: how many rounds a side would
    probably decide it (None where decided, or where more rounds would not help). metric is None where the benchmark as
    a whole could not be compared (outcome ERROR). reason: one sentence for a person.
    """

    benchmark: str
    group: str
    metric: Metric | None
    outcome: Outcome
    reason: str
    base: float | None = None
    head: float | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    tolerance: float | None = None
    improved: bool = False
    rounds: tuple[int, int] = (0, 0)
    rounds_needed: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs compared. notes: what a reader should know and no verdict says (new benchmarks, "the machine changed").

    paired: whether rounds were taken in turn (`perf ab`), so that round i of one belongs to round i of the other.
    """

    base: Run
    head: Run
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    paired: bool = False

    @property
    def outcome(self) -> Outcome:
        """The gravest outcome of any verdict; without a verdict there is nothing to compare, an ERROR."""
        found = {verdict.outcome for verdict in self.verdicts}
        return next((outcome for outcome in Outcome if outcome in found), Outcome.ERROR)

    @property
    def exit(self) -> Exit:
        codes = (Exit.REGRESSION, Exit.NOT_COMPARABLE, Exit.INCONCLUSIVE, Exit.PASS)
        return dict(zip(Outcome, codes, strict=True))[self.outcome]
