"""The curve of throughput against latency: one workload offered at rising rates, until the server falls
behind.

At each rate the requests come by chance (Poisson) and are judged in the steady part of the load alone
(perf/measure/steady.py). The answer is the highest rate at which 99 of 100 requests meet the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine import EngineMetrics, Workload
from perf.gate import writing
from perf.gate.entries import SETUP, Flat
from perf.measure.session import BenchSession
from perf.measure.slo import Slo
from perf.measure.steady import KEEPS_UP, Steady
from perf.measure.trial import Trial

MET_PCT = 99.0
BELOW = (0.25, 0.5, 0.75, 1.0)  # of the rate at which all requests at once are served, tried by `auto`
HALVINGS = 3  # between the highest rate that was met and the lowest that was not
DIGITS = 3  # of a rate
LIMITS = ("slo_ttft_ms", "slo_tpot_ms")
# What a record of all rates has in common with that of each.
ALIKE = (
    "fingerprint",
    "schema",
    "group",
    *SETUP,
    "workload",
    "seed",
    "backend",
    "slo_ttft_ms",
    "slo_tpot_ms",
)


@dataclass(frozen=True, slots=True)
class Point:
    """One rate: requests a second that were offered, and what was measured. info: the trial's record.
    seconds: how long it took."""

    rate: float
    info: Flat
    seconds: float

    @property
    def met_pct(self) -> float:
        return float(self.info["slo_met_pct"])

    @property
    def met(self) -> bool:
        return self.met_pct >= MET_PCT

    @property
    def saturated(self) -> bool:
        """Return whether the limits are missed and fewer requests end than come: the queue grows as long as
        it lasts."""
        offered, ended = (float(self.info[f"steady_{what}_rate"]) for what in ("offered", "ended"))
        return not self.met and ended < KEEPS_UP * offered


@dataclass(frozen=True)
class Curve:
    """Points by rising rate. capacity: requests a second, where all come at once. ended_by: why no higher
    rate was tried; None if all that were asked for were."""

    workload: str
    slo: Slo
    capacity: float
    points: tuple[Point, ...]
    ended_by: str | None = None

    @property
    def best(self) -> Point | None:
        """The highest rate that met the limits, as did all below it; None if none did."""
        found = None
        for point in self.points:
            if not point.met:
                break
            found = point
        return found

    def entries(self) -> list[Flat]:
        """Return a benchmark a rate, and one of the highest that met the limits, as a saved run has them.

        What each rate came to is comparable where the rates are the same, as where they were named; the
        highest always is.
        """
        found = [
            writing.entry(f"sweep::{self.workload}-r{point.rate:g}", "sweep", [point.seconds], point.info)
            for point in self.points
        ]
        rate = self.best.rate if self.best else 0.0
        first = self.points[0].info
        same = {name: first[name] for name in ALIKE if name in first}
        highest = {**same, "rate_within_limits": rate, "rounds": {"rate_within_limits": [rate]}}
        seconds = [sum(point.seconds for point in self.points)]
        return [*found, writing.entry(f"sweep::{self.workload}", "sweep", seconds, highest)]

    def plain(self) -> Flat:
        """Return all of it as plain Python, for JSON."""
        best = self.best
        return {
            "workload": self.workload,
            **self.slo.limits(),
            "met_pct_wanted": MET_PCT,
            "capacity": self.capacity,
            "best_rate": best.rate if best else None,
            "ended_by": self.ended_by,
            "points": [{"rate": point.rate, **point.info} for point in self.points],
        }


def sweep(
    bench: BenchSession,
    backend: str,
    workload: str | Workload,
    rates: Sequence[float] | None,
    *,
    slo: Slo,
    max_batch_size: int,
    options: dict[str, Any] | None = None,
    advance: Callable[[str], object] = lambda _: None,
) -> Curve:
    """Measure a curve.

    Args:
        rates: requests a second, or None: fractions of what is served at most, and then halves between the
            highest that met the limits and the lowest that did not.
        slo: limits of a request.
        max_batch_size: requests on their way at once where all come together, and the batch of an engine.
        advance: called with a line before each load.

    Raises:
        InputError: as Trial does; TargetError if a server fails.
    """
    how: dict[str, Any] = {"device": "cpu", "max_batch_size": max_batch_size, "options": options}
    advance("all requests at once")
    first = Trial(bench, "sweep", backend, workload, **how)
    points: dict[float, Point] = {}
    ended_by = None
    try:
        first.prove()
        first.time_round()
        capacity = len(first.workload.items) / first.info()["wall_s"]
        found = sorted({_rounded(rate) for rate in rates or [share * capacity for share in BELOW]})
        for rate in found:
            advance(f"{rate:g} requests a second")
            points[rate] = point = _measure(bench, backend, workload, rate, slo, first, how)
            if point.saturated:
                ended_by = f"at {rate:g} requests a second it falls behind"
                break
        for _ in range(0 if rates else HALVINGS):
            between = _between(points)
            if between is None or between in points:
                break
            advance(f"{between:g} requests a second")
            points[between] = _measure(bench, backend, workload, between, slo, first, how)
    finally:
        first.close()
    by_rate = tuple(points[rate] for rate in sorted(points))
    return Curve(first.workload.name, slo, capacity, by_rate, ended_by)


def _measure(
    bench: BenchSession,
    backend: str,
    workload: str | Workload,
    rate: float,
    slo: Slo,
    first: Trial,
    how: dict[str, Any],
) -> Point:
    def derive(flat: Flat, metrics: EngineMetrics) -> Flat:
        return {"offered_rate": rate, **slo.limits(), **Steady.of(metrics).flat(slo)}

    trial = Trial(
        bench, "sweep", backend, workload, arrivals=f"poisson:{rate}", derive=derive,
        session=first.session, **how,
    )  # fmt: skip
    trial.time_round()
    return Point(rate, trial.info(), trial.rounds[0].seconds)


def _between(points: dict[float, Point]) -> float | None:
    """Return the rate half way between the highest that was met and the lowest that was not; None if there
    is none."""
    missed = min((rate for rate, point in points.items() if not point.met), default=math.inf)
    met = max((rate for rate, point in points.items() if point.met and rate < missed), default=0.0)
    return None if missed == math.inf else _rounded((met + missed) / 2)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")
