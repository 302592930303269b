"""The steady part of open load: requests that were due after it had filled up, and before it ran empty.

The first fifth of the arrivals meets a server that is still idle, and says how it starts rather than how it
serves. What was due later counts to its end, however long that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine import EngineMetrics, RequestMetrics
from perf.gate.entries import Flat
from perf.measure.slo import Slo

FILLING = 0.2  # of the time in which requests come
KEEPS_UP = 0.9  # as many requests must end in it as 90 % of those that were due in it


@dataclass(frozen=True, slots=True)
class Steady:
    """requests: those that were due in the window. seconds: how long it is. ended: how many of all requests
    ended in it."""

    requests: tuple[RequestMetrics, ...]
    seconds: float
    ended: int

    @classmethod
    def of(cls, metrics: EngineMetrics) -> Steady:
        """Return the window of a run."""
        records = list(metrics.records)
        due = [record.arrival_s for record in records]
        begin, end = min(due) + FILLING * (max(due) - min(due)), max(due)
        within = tuple(record for record in records if begin <= record.arrival_s <= end)
        ended = sum(begin <= record.finished_s <= end for record in records)
        return cls(within, end - begin, ended)

    def flat(self, slo: Slo) -> Flat:
        """Return what a record says of it: the rate at which requests were offered and ended, and goodput."""
        met = sum(map(slo.met, self.requests))
        ttfts = [record.ttft_ms for record in self.requests if record.ttft_ms is not None]
        return {
            "steady_requests": len(self.requests),
            "steady_offered_rate": len(self.requests) / self.seconds if self.seconds else 0.0,
            "steady_ended_rate": self.ended / self.seconds if self.seconds else 0.0,
            "slo_met_pct": 100.0 * met / len(self.requests),
            "goodput": met / self.seconds if self.seconds else 0.0,
            "steady_ttft_p95_ms": float(np.percentile(ttfts, 95)) if ttfts else None,
        }
