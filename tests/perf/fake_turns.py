"""Pairs of processes that are none: groups of rounds are drawn, and the clock moves as if they took their
time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from perf.ab import turns
from perf.ab.groups import ORDERS, Group, Turn

START_S, TURN_S = 6.0, 0.03


class FakePairs:
    """Stands for `turns.pair` and its clock.

    benchmarks: their names, in order. effect: log(head / base) of a benchmark with an injected slowdown, as
    text or None. noise, between: standard deviations of a round, and of a pair of processes, in logarithms.
    measured: (pair, benchmark, slowdown) of each group.
    """

    def __init__(
        self,
        benchmarks: Sequence[str],
        effect: Callable[[str, str | None], float],
        noise: float = 0.05,
        between: float = 0.004,
        seed: int = 0,
    ) -> None:
        self.common, self.effect, self.noise, self.between = list(benchmarks), effect, noise, between
        self.replayed: set[str] = set()
        self.now, self.started = 0.0, 0
        self.measured: list[tuple[int, str, str | None]] = []
        self.rng = np.random.default_rng(seed)
        self._lie = 0.0

    @contextmanager
    def pair(self, sides: object, noise: object) -> Iterator[FakePairs]:
        self.started += 1
        self.now += START_S
        self._lie = self.rng.normal(0, self.between)
        yield self

    def run(self, wanted: Collection[str], measure: Callable, alone: bool = False) -> None:
        for name in self.common:
            if name in wanted:
                measure(name, FakeMeeting(self, name))

    def conclude(self) -> list[None]:
        self.now += 1.0
        return [None, None]

    def group(self, name: str, slowdown: str | None) -> Group:
        self.measured.append((self.started, name, slowdown))
        self.now += 4 * TURN_S
        order = ORDERS[int(self.rng.integers(2))]
        log = self.effect(name, slowdown) + self._lie
        values = [np.exp(side * log + self.rng.normal(0, self.noise)) for side in order]
        samples = [{"tokens_per_s": 100 / v, "ttft_p50_ms": 50 * v, "itl_p99_ms": [v] * 1000} for v in values]
        made = [Turn(TURN_S, TURN_S, (sample,), (1e-4, 1e-4), 0.0, 0, 0) for sample in samples]
        return Group(order, tuple(made))


class FakeMeeting:
    gate = None

    def __init__(self, pairs: FakePairs, name: str) -> None:
        self.pairs, self.name = pairs, name

    def warm_up(self, seconds: float) -> None:
        self.pairs.now += 2 * TURN_S

    def group(self, seconds: float, slowdown: str | None = None) -> Group:
        return self.pairs.group(self.name, slowdown)


@contextmanager
def no_sides(number: int) -> Iterator[tuple[()]]:
    yield ()


def install(patch: pytest.MonkeyPatch, pairs: FakePairs) -> FakePairs:
    """Have experiments measure these."""
    patch.setattr(turns, "pair", pairs.pair)
    patch.setattr(turns, "clock", lambda: pairs.now)
    return pairs
