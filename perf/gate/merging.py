"""Sessions of one commit put together: a benchmark with the rounds of each, or a problem that says why not.

Nothing is averaged away and nothing is left out silently: what some sessions lack, or measured as another
thing or on another machine, is an error of that benchmark or metric, and never a mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import TypeGuard

from perf.gate.entries import Benchmark, Scalar, differences
from perf.gate.metrics import METRICS

VOIDED = "rounds_voided"


def merge(found: Sequence[Benchmark | None], unit: str = "sessions") -> Benchmark:
    """One benchmark of what each session has of it, oldest first; None where a session does not have it.

    `unit` is what they are called, in the plural.

    What is said once (tolerances, notes) is the last session's, numbers are the median session's.
    """
    known = [benchmark for benchmark in found if benchmark is not None]
    last = known[-1]
    problems = {metric: why for benchmark in known for metric, why in benchmark.problems.items()}
    if len(known) < len(found):
        part = f"{len(known)} of {len(found)} {unit} only"
        problems[""] = f"was measured in {part}: measure it again"
    elif "" not in problems and (why := _disagreement(known, unit)):
        problems[""] = why
    rounds: dict[str, tuple[float, ...]] = {}
    for metric in dict.fromkeys(name for benchmark in known for name in benchmark.rounds):
        some = [benchmark.rounds[metric] for benchmark in known if metric in benchmark.rounds]
        if len(some) == len(known):
            rounds[metric] = tuple(value for each in some for value in each)
        else:
            problems.setdefault(metric, f"was recorded in {len(some)} of {len(known)} {unit} only")
    sessions = tuple({metric: benchmark.rounds[metric] for metric in rounds} for benchmark in known)
    return replace(last, info=_info(known), rounds=rounds, problems=problems, sessions=sessions)


def _disagreement(sessions: Sequence[Benchmark], unit: str) -> str | None:
    """Say in what two neighbouring sessions differ that must be the same in all, or None."""
    for before, after in pairwise(sessions):
        if prints := differences(before.fingerprint, after.fingerprint):
            return f"has another fingerprint in some {unit}: {prints}; measure them again here"
        if work := differences(before.identity(), after.identity()):
            return f"is another thing in some {unit}: {work}; give all of them the same options"
    return None


def _info(sessions: Sequence[Benchmark]) -> Mapping[str, Scalar]:
    info = dict(sessions[-1].info)
    for key in info:
        values = [value for one in sessions if _is_number(value := one.info.get(key))]
        if key == VOIDED and values:
            info[key] = sum(values)
        elif key in METRICS:
            info[key] = median(values) if len(values) == len(sessions) else None
    return info


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
