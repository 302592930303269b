"""Limits of a request that was served well enough, and the share of a load that met them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine import EngineMetrics, InputError
from perf.gate.entries import Flat

NAMES = ("ttft", "tpot")
WAY_OUT = "give milliseconds above 0: ttft=200,tpot=50; one that is left out has no limit"


@dataclass(frozen=True, slots=True)
class Slo:
    """The longest TTFT and TPOT, in milliseconds; infinite where there is no limit."""

    ttft_ms: float = 200.0
    tpot_ms: float = 50.0

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Return the limits in `ttft=200,tpot=50`. Raises InputError for anything else."""
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if name not in NAMES or name in found or not 0 < value < math.inf:
                raise InputError(f"slo={text!r} has {part.strip()!r}: {WAY_OUT}")
            found[name] = value
        return cls(found.get("ttft", math.inf), found.get("tpot", math.inf))

    def of(self, flat: Flat, metrics: EngineMetrics) -> Flat:
        """Return what a record says of the limits, and the goodput: requests a second that met them."""
        limits = {"slo_ttft_ms": self.ttft_ms, "slo_tpot_ms": self.tpot_ms}
        finite = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        requests = len(metrics.records)
        met = metrics.goodput(self.ttft_ms, self.tpot_ms) * metrics.wall_s / requests if requests else 0.0
        return {**finite, "slo_met_pct": 100 * met, "goodput": metrics.goodput(self.ttft_ms, self.tpot_ms)}
