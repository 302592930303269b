"""Sweeps over a server of which everything is known: one request after the other, each for the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine import SamplingParams, WorkItem, Workload
from perf.backends import Checked, Judge, Outcome, Setup, timeline
from perf.errors import Exit
from perf.gate.noise import read_noise
from perf.gate.saved_runs import load
from perf.gate.verdict import compare_saved
from perf.gate.writing import run_of, save
from perf.measure import machine_speed, sweep as module
from perf.measure.machine_speed import MachineSpeed
from perf.measure.session import BenchSession
from perf.measure.slo import Slo
from perf.measure.sweep import Curve, Point, sweep
from perf.report.sweep_table import conclusion, sweep_table, write_plot
from perf.report.terminal import drawn

SERVICE_S = 0.05  # of a request, so that 20 a second are served at most
REQUESTS = 200
Measure = Callable[..., Curve]
LIMITS = Slo(200, 50)


class Queue:
    """A backend that answers in no time, with the times of a queue with one server."""

    name = "queue"
    remote = True
    exact = False
    opened = 0

    def missing(self, device: str) -> str | None:
        return None

    def open(self, setup: Setup) -> Queue:
        Queue.opened += 1
        return self

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"of": "a test"}

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        free, tokens, seconds = 0.0, [], []
        for item in items:
            free = max(free, item.arrival_s) + SERVICE_S
            tokens.append([1, 2])
            seconds.append([free - SERVICE_S / 2, free])
        return timeline(items, tokens, seconds)

    def check(self, items: Sequence[WorkItem], judge: Judge | None) -> Checked:
        return Checked(len(items), 0, len(items))

    def close(self) -> None:
        Queue.opened -= 1


@pytest.fixture
def curve_of(imported_for_measuring: None, monkeypatch: pytest.MonkeyPatch) -> Measure:
    def workload(name: str, arrivals: str, **limits: object) -> Workload:
        rate = float(arrivals.partition(":")[2] or 0)
        gaps = np.random.default_rng(0).exponential(1 / rate, REQUESTS) if rate else np.zeros(REQUESTS)
        due = np.cumsum(gaps).tolist()
        params = SamplingParams(max_new_tokens=2, temperature=0)
        items = tuple(WorkItem([1, 2], params, at) for at in due)
        return Workload(name, 0, arrivals, items)

    monkeypatch.setattr("perf.measure.trial.make_workload", workload)
    monkeypatch.setattr(machine_speed, "measure", lambda *args, **how: MachineSpeed(100.0, 10.0))
    bench = BenchSession(model=None, dtype=None, rounds=1, quick=False, inject_slowdown=0.0)

    def make(rates: list[float] | None, slo: Slo = LIMITS) -> Curve:
        said: list[str] = []
        found = sweep(
            bench, f"{__name__}:Queue", "queue-200", rates, slo=slo, max_batch_size=4, advance=said.append
        )
        assert len(said) == 1 + len(found.points)
        assert Queue.opened == 0
        return found

    return make


def test_it_stops_where_the_server_falls_behind(curve_of: Measure) -> None:
    curve = curve_of([40, 5, 10, 80])
    assert curve.capacity == pytest.approx(20)
    assert [point.rate for point in curve.points] == [5, 10, 40]
    assert [point.saturated for point in curve.points] == [False, False, True]
    assert curve.ended_by == "at 40 requests a second it falls behind"
    assert curve.best is not None
    assert curve.best.rate == 10
    assert curve.best.info["goodput"] == pytest.approx(10, rel=0.15)
    assert "10 requests a second are served within the limits" in conclusion(curve)


def test_auto_closes_in_on_the_highest_rate(curve_of: Measure) -> None:
    curve = curve_of(None)
    best = curve.best
    assert best is not None
    above = [point.rate for point in curve.points if point.rate > best.rate]
    assert 10 <= best.rate < 20
    assert min(above) - best.rate <= 20 / 4 / 2**module.HALVINGS + 0.1
    assert not any(point.met for point in curve.points if point.rate > best.rate)
    assert [point.rate for point in curve.points] == sorted(point.rate for point in curve.points)


def test_limits_that_no_rate_meets(curve_of: Measure) -> None:
    curve = curve_of([5, 10], Slo(1, 50))
    assert curve.best is None
    assert "no rate met the limits" in conclusion(curve)
    assert curve.plain()["best_rate"] is None


def test_rates_that_all_meet_them(curve_of: Measure) -> None:
    curve = curve_of([1, 2])
    assert curve.ended_by is None
    assert "every rate up to 2 requests a second met the limits: offer more" in conclusion(curve)


def test_the_table_and_the_picture(curve_of: Measure, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = curve_of([5, 10, 40])
    text = "\n".join(drawn(sweep_table(curve), 180))
    assert "queue-200, TTFT 200 ms, TPOT 50 ms" in text
    assert "falls behind" in text
    assert "the highest" in text
    for name in ("a.png", "a.svg"):
        write_plot(tmp_path / name, curve)
        assert (tmp_path / name).stat().st_size > 1000


def test_a_saved_sweep_is_a_run(curve_of: Measure, tmp_path: Path) -> None:
    for name in ("main", "same"):
        save(run_of(curve_of([5, 10, 40]).entries(), {}), name, tmp_path)
    runs = [load(name, tmp_path) for name in ("main", "same")]
    assert sorted(runs[0].benchmarks) == [
        "sweep::queue-200", "sweep::queue-200-r10", "sweep::queue-200-r40", "sweep::queue-200-r5",
    ]  # fmt: skip
    highest = runs[0].benchmarks["sweep::queue-200"]
    assert highest.rounds == {"rate_within_limits": (10.0,)}
    assert not highest.problems
    assert "goodput" in runs[0].benchmarks["sweep::queue-200-r5"].rounds
    found = compare_saved(*runs, read_noise(tmp_path, runs))
    assert found.exit is not Exit.NOT_COMPARABLE, found


def test_a_rate_above_one_that_missed_is_not_the_best() -> None:
    info = {"steady_ended_rate": 9.0, "steady_offered_rate": 9.0}
    points = tuple(
        Point(rate, {**info, "slo_met_pct": met}, 1.0) for rate, met in ((1, 100), (2, 90), (3, 100))
    )
    best = Curve("w", Slo(), 10.0, points).best
    assert best is not None
    assert best.rate == 1
