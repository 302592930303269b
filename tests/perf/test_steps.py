"""Steps in a history: exact partitions, how often noise is called one, how often a real one is found."""

from __future__ import annotations

import math
import shlex
from itertools import combinations

import numpy as np
import pytest

from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run
from perf.gate.steps import LEAST, NO_STEPS, change_points, find_steps, noise, partition
from tests.perf.histories import history

SERIES, RUNS, NOISE = 400, 60, 0.03


def series(correlation: float, seed: int, count: int = SERIES, n: int = RUNS, deviation: float = NOISE):
    """Log values around 0, normal, each correlated with the one before (AR(1))."""
    shocks = np.random.default_rng(seed).normal(0.0, 1.0, (count, n + 50))
    found = np.zeros_like(shocks)
    for at in range(1, n + 50):
        found[:, at] = correlation * found[:, at - 1] + shocks[:, at]
    return deviation * math.sqrt(1 - correlation**2) * found[:, 50:]


def test_a_partition_is_the_cheapest_there_is():
    def cost(values, cuts, penalty):
        return sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts)) + penalty * len(cuts)

    rng = np.random.default_rng(0)
    for n in range(2 * LEAST, 13):
        values = rng.normal(0.0, 1.0, n) + np.where(np.arange(n) < n // 2, 0.0, 2.0)
        all_cuts = [
            list(cuts)
            for count in range(n // LEAST)
            for cuts in combinations(range(1, n), count)
            if np.diff([0, *cuts, n]).min() >= LEAST
        ]
        for penalty in (0.5, 2.0, 8.0):
            best = min(all_cuts, key=lambda cuts: cost(values, cuts, penalty))
            assert partition(values, penalty) == best


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_noise_alone_has_a_step_in_one_series_of_twenty_at_most(correlation):
    false = sum(bool(change_points(values, 0.0)[0]) for values in series(correlation, seed=1))
    assert false <= SERIES // 20


@pytest.mark.parametrize("correlation", [0.0, 0.3])
@pytest.mark.parametrize("step", [0.10, -0.10])
def test_a_step_of_three_deviations_is_found_where_it_is(correlation, step):
    places = np.random.default_rng(2).integers(LEAST, RUNS - LEAST + 1, SERIES // 2)
    found = 0
    for values, place in zip(series(correlation, 3, SERIES // 2), places, strict=True):
        values[place:] += math.log1p(step)
        found += any(abs(cut - place) <= 2 for cut in change_points(values, 0.02)[0])
    assert found >= 0.95 * SERIES // 2


@pytest.mark.parametrize("nights", [[20], [0], [59], [20, 22], [5, 30, 55]])
def test_bad_nights_are_no_steps(nights):
    for values in series(0.0, seed=4, count=20, deviation=0.005):
        values[nights] += 0.5
        assert change_points(values, 0.02)[0] == []


def test_what_never_varies_has_the_steps_that_matter_and_no_others():
    values = np.log(np.r_[[100.0] * 10, [100.5] * 10, [110.0] * 10])
    cuts, levels = change_points(values, math.log1p(0.02))
    assert cuts == [20]
    assert np.exp(levels) == pytest.approx([100.25, 110.0], rel=1e-3)
    assert change_points(np.full(30, 5.0), 0.0)[0] == []
    assert noise(np.full(30, 5.0)) == 0.0


def test_a_step_names_what_a_reader_must_know():
    slower = [100.0 * (1 + 0.001 * (n % 3)) * (0.8 if n >= 7 else 1.0) for n in range(12)]
    runs = history({"tokens_per_s": slower, "ttft_p50_ms": [50.0] * 12})
    steps = find_steps(runs)
    [step] = steps.found
    assert steps.searched == 2
    assert step.metric is METRICS["tokens_per_s"]
    assert step.worse
    assert step.change == pytest.approx(-0.2, abs=0.002)
    assert (step.before, step.after) == pytest.approx((100.1, 80.1), abs=0.1)
    assert (step.last, step.first) == (runs[6], runs[7])
    assert step.commits == "000000006..000000007"
    command = f"python -m perf bisect 000000006 000000007 -- {shlex.quote(step.benchmark)}"
    assert step.command == command


def test_each_metric_has_its_own_better_side_and_what_is_better_has_no_command():
    faster = [50.0] * 6 + [30.0] * 6
    [step] = find_steps(history({"ttft_p50_ms": faster})).found
    assert not step.worse
    assert step.command is None
    [step] = find_steps(history({"ttft_p50_ms": faster[::-1]})).found
    assert step.worse
    [step] = find_steps(history({"tokens_per_s": faster[::-1]})).found
    assert not step.worse


@pytest.mark.parametrize(
    ("about", "commits"),
    [
        ({"id": "f" * 40, "dirty": False}, "fffffffff alone: not the code"),
        ({"id": "f" * 40, "dirty": True}, "fffffffff+..fffffffff+"),
        ({}, "no commit..no commit"),
        ({"id": "$(reboot)"}, "$(reboot) alone: not the code"),
    ],
)
def test_commits_that_cannot_be_searched_are_not_put_into_a_command(about, commits):
    [step] = find_steps(history({"tokens_per_s": [100.0] * 6 + [80.0] * 6}, commit=about)).found
    assert (step.command, step.commits) == (None, commits)


def test_a_change_within_the_tolerance_is_none():
    values = [100.0] * 10 + [98.5] * 10
    assert find_steps(history({"tokens_per_s": values})).found == ()
    assert len(find_steps(history({"tokens_per_s": [100.0] * 10 + [97.5] * 10})).found) == 1
    assert (
        find_steps(history({"tokens_per_s": [100.0] * 10 + [90.0] * 10}, gate={"tokens_per_s": 0.2})).found
        == ()
    )
    assert find_steps(history({"ttft_p50_ms": [1.0] * 10 + [1.4] * 10})).found == ()  # 0.5 ms is nothing


def test_a_series_is_of_one_machine_and_one_kind_of_work():
    values = [100.0] * 6 + [80.0] * 6
    runs = history({"tokens_per_s": values}, prints=[{"gpu": "A"}] * 6 + [{"gpu": "B"}] * 6)
    assert find_steps(runs) == find_steps(runs[6:])
    assert (find_steps(runs).found, find_steps(runs).searched) == ((), 1)
    runs = history({"tokens_per_s": values}, workloads=["mixed-8"] * 6 + ["mixed-16"] * 6)
    assert find_steps(runs).found == ()
    assert find_steps(history({"tokens_per_s": [100.0, 80.0]})) == NO_STEPS


def test_counters_and_rounds_of_zero_do_no_harm():
    runs = history({"goodput": [0.0] * 6 + [5.0] * 6, "forward_passes": [1.0] * 6 + [2.0] * 6})
    [step] = find_steps(runs).found
    assert step.metric.name == "goodput"
    assert find_steps(history({"goodput": [0.0] * 12})).found == ()
    [step] = find_steps(history({"tokens_per_s": [5e-324] * 6 + [1.7e308] * 6})).found
    assert step.change == math.inf


def test_the_latest_steps_come_first():
    up = [100.0] * 4 + [120.0] * 4 + [100.0] * 4
    steps = find_steps(history({"tokens_per_s": up, "ttft_p50_ms": [50.0] * 8 + [90.0] * 4}))
    assert [(step.metric.name, step.commits[-1]) for step in steps.found] == [
        ("ttft_p50_ms", "8"), ("tokens_per_s", "8"), ("tokens_per_s", "4"),
    ]  # fmt: skip
    assert [run.name for run in (steps.found[0].last, steps.found[0].first)] == ["night", "night"]
    assert isinstance(steps.found[0].first, Run)
