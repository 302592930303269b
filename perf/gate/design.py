"""Designs of an experiment: how base and head were measured, and so what a difference between them is worth.

A design turns the rounds of one metric on both sides into an estimate of log(head / base). The judge
(perf/gate/verdict.py) needs no more than that, and knows none of them by name.
"""

from __future__ import annotations

from typing import Protocol

from perf.errors import GateError
from perf.gate import stats
from perf.gate.entries import Benchmark
from perf.gate.stats import Estimate


class UndecidedError(Exception):
    """There is no estimate yet: too little was measured, or how it varies is not known.

    needed: units with which there would probably be one.
    """

    def __init__(self, reason: str, needed: int | None = None) -> None:
        super().__init__(reason)
        self.needed = needed


class Design(Protocol):
    """How two runs were measured.

    name: for a reader and for JSON. unit: what is independent and counted, in the plural. side_by_side:
    whether both saw the same machine, so that it cannot have changed from base to head.
    """

    name: str
    unit: str
    side_by_side: bool

    def count(self, before: Benchmark, after: Benchmark, metric: str) -> tuple[int, int]:
        """The units that base and head have of a metric."""

    def estimate(self, before: Benchmark, after: Benchmark, metric: str) -> Estimate:
        """Return log(head / base) of a metric that both sides have, with its interval.

        Raises:
            UndecidedError: if what was measured cannot tell anything.
            GateError: if the two do not belong together.
        """


class PairedBlocks:
    """Round i of one was measured next to round i of the other, each the typical value of a fresh process."""

    name, unit, side_by_side = "blocks", "pairs", False

    def count(self, before: Benchmark, after: Benchmark, metric: str) -> tuple[int, int]:
        return len(before.rounds[metric]), len(after.rounds[metric])

    def estimate(self, before: Benchmark, after: Benchmark, metric: str) -> Estimate:
        base, head = self.count(before, after, metric)
        if base != head:
            raise GateError(f"{base} blocks of base and {head} of head make no pairs")
        if base < stats.MIN_PAIRS:
            raise too_few((base, head), self.unit, stats.MIN_PAIRS)
        return stats.compare_pairs(before.rounds[metric], after.rounds[metric])


def too_few(counts: tuple[int, int], unit: str, least: int) -> UndecidedError:
    """The error of a design that has fewer units than it needs."""
    few = f"{counts[0]}" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]}"
    return UndecidedError(f"{few} {unit}: too few to tell anything, {least} or more are needed", least)
