"""Two runs compared: a verdict a metric, and from them the outcome and the exit code of the whole.

Plain data that perf/gate/verdict.py makes and perf/report shows. Nothing here judges, measures or prints.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from perf.errors import Exit
from perf.gate.metrics import Metric
from perf.gate.saved_runs import Run


class Outcome(StrEnum):
    """Outcome of a metric, of a benchmark or of a whole comparison; in order of rank, gravest first."""

    FAIL = "FAIL"
    ERROR = "ERROR"  # should have been compared and could not be
    INCONCLUSIVE = "INCONCLUSIVE"
    PASS = "PASS"


SESSIONS = "sessions"  # the design of saved runs

EXITS = {
    Outcome.FAIL: Exit.REGRESSION,
    Outcome.ERROR: Exit.NOT_COMPARABLE,
    Outcome.INCONCLUSIVE: Exit.INCONCLUSIVE,
    Outcome.PASS: Exit.PASS,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One metric of one benchmark.

    metric: None where the benchmark as a whole could not be compared (outcome ERROR). reason: a sentence for
    a person. base, head: typical values. effect: head / base - 1, signed as measured (+0.10 is 10 % more,
    whatever is better); low, high: its 95 % interval. tolerance: by how much it may get worse, a fraction,
    the floor included. improved: surely and noticeably better. rounds: of base and head, how many they have
    of what the design counts (sessions, pairs); of a counter, values. rounds_needed: so many a side would
    probably decide it (None where decided, or where more would not help). p: how likely so bad an effect is
    without any change.
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
    p: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs compared.

    notes: facts that a reader should know and no verdict says (new benchmarks, "the machine changed").
    design: how they were measured; see perf/gate/design.py.
    """

    base: Run
    head: Run
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    design: str = SESSIONS

    @property
    def outcome(self) -> Outcome:
        """The gravest outcome of any verdict; without a verdict there is nothing to compare, an ERROR."""
        found = {verdict.outcome for verdict in self.verdicts}
        return next((outcome for outcome in Outcome if outcome in found), Outcome.ERROR)

    @property
    def exit(self) -> Exit:
        return EXITS[self.outcome]

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON: outcome, exit, notes, and a flat record a verdict."""
        whole = {"outcome": str(self.outcome), "exit": int(self.exit), "design": self.design}
        runs = {side: _plain_run(run) for side, run in (("base", self.base), ("head", self.head))}
        if self.design == SESSIONS:
            runs["base"]["sessions"], runs["head"]["sessions"] = self.base.sessions, self.head.sessions
        verdicts = [_plain_verdict(verdict) for verdict in self.verdicts]
        return {**whole, "notes": list(self.notes), **runs, "verdicts": verdicts}


def _plain_run(run: Run) -> dict[str, Any]:
    return {"name": run.name, "path": str(run.path), "commit": run.commit.get("id"), "datetime": run.datetime}


def _plain_verdict(verdict: Verdict) -> dict[str, Any]:
    record = asdict(verdict) | {"metric": verdict.metric and verdict.metric.name}
    record["rounds"] = list(verdict.rounds)
    no_number = {
        key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)
    }
    return record | dict.fromkeys(no_number)  # JSON has no infinity
