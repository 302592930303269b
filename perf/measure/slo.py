"""Limits of a request that was served well enough, and the share of a load that met them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine import EngineMetrics, InputError, RequestMetrics
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

    def met(self, request: RequestMetrics) -> bool:
        """Return whether a request ended by itself and within both limits."""
        return request.meets(self.ttft_ms, self.tpot_ms)

    def limits(self) -> Flat:
        """Return what a record says of the limits."""
        both = {"slo_ttft_ms": self.ttft_ms, "slo_tpot_ms": self.tpot_ms}
        return {name: limit for name, limit in both.items() if math.isfinite(limit)}

    def of(self, metrics: EngineMetrics) -> Flat:
        """Return the limits, how many requests met them, and the goodput: how many a second."""
        met = sum(map(self.met, metrics.records))
        share = 100.0 * met / len(metrics.records) if metrics.records else 0.0
        goodput = metrics.goodput(self.ttft_ms, self.tpot_ms)
        return {**self.limits(), "slo_met_pct": share, "goodput": goodput}
