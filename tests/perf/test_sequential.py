"""The error of one look over as many as are planned: boundaries from the literature, and simulations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from perf.ab import sequential
from perf.ab.in_turn import combine

DATA = Path(__file__).parent / "data"
LOOKS, PAIRS = 24, 3
MOST = 0.025  # one-sided


@pytest.mark.parametrize(("looks", "bounds"), [
    (1, [1.960]), (2, [2.963, 1.969]), (3, [3.710, 2.511, 1.993]), (5, [4.877, 3.357, 2.680, 2.290, 2.031]),
])  # fmt: skip
def test_boundaries_are_those_of_the_literature(looks, bounds):
    """Of O'Brien and Fleming's kind by Lan and DeMets, two-sided 5 % (Jennison and Turnbull 2000)."""
    found = [float(norm.isf(level / 2)) for level in sequential.nominal(0.05, looks)]
    assert found == pytest.approx(bounds, abs=2e-3)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_all_looks_together_have_the_error_of_one(alpha):
    paths = np.random.default_rng(0).normal(size=(100_000, LOOKS)).cumsum(1) / np.sqrt(
        np.arange(1, LOOKS + 1)
    )
    crossed = (2 * norm.sf(abs(paths)) < np.array(sequential.nominal(alpha, LOOKS))).any(1).mean()
    assert crossed == pytest.approx(alpha, abs=4 * math.sqrt(alpha / 100_000))


@pytest.mark.parametrize("look", [1, 5, 12, 23, 24])
def test_an_interval_just_touches_no_change_where_p_is_the_error_that_is_allowed(look):
    one = sequential.estimate(0.0, 0.01, 20.0, look, LOOKS)
    edge = sequential.estimate(one.high, 0.01, 20.0, look, LOOKS)
    assert edge.low == pytest.approx(0.0, abs=1e-12)
    assert (edge.p_rise, edge.p_fall) == (pytest.approx(MOST, rel=0.02), pytest.approx(0.5))
    further = sequential.estimate(1.2 * one.high, 0.01, 20.0, look, LOOKS)
    assert further.p_rise < edge.p_rise
    mirrored = sequential.estimate(-one.high, 0.01, 20.0, look, LOOKS)
    assert (mirrored.p_fall, mirrored.high) == (pytest.approx(edge.p_rise), pytest.approx(0.0, abs=1e-12))


def test_without_any_error_the_sign_decides():
    assert sequential.estimate(0.1, 0.0, 5.0, 1, LOOKS).p_rise == 0.0
    assert sequential.estimate(0.0, 0.0, 5.0, 1, LOOKS).p_rise == 1.0


def false_alarms(draw, runs, seed):
    """How often an interval leaves out no change, above and below, at any look of a run of identical code."""
    rng = np.random.default_rng(seed)
    above = below = 0
    for _ in range(runs):
        pairs = [np.asarray(pair) for pair in draw(rng)]
        found = []
        for look in range(1, LOOKS + 1):
            done, part = divmod(look, LOOKS // PAIRS)
            share = len(pairs[0]) * part // (LOOKS // PAIRS)
            seen = [*pairs[:done], *([pairs[done][:share]] if share else [])]
            if sum(map(len, seen)) >= 6:
                one = combine(seen)
                found.append(sequential.estimate(one.log_ratio, one.error, one.df, look, LOOKS))
        above += any(estimate.low > 0 for estimate in found)
        below += any(estimate.high < 0 for estimate in found)
    return above / runs, below / runs


def normal(rng):
    return [rng.normal(rng.normal(0, 0.005), 0.08, 100) for _ in range(PAIRS)]


def few(rng):
    return [rng.normal(rng.normal(0, 0.005), 0.02, 4) for _ in range(PAIRS)]


def outliers(rng):
    return [
        rng.normal(rng.normal(0, 0.005), 0.02, 60) + 0.5 * rng.standard_t(2, 60) * 0.05 for _ in range(PAIRS)
    ]


def drifting(rng):
    """Neighbours that are alike."""
    noise = [np.convolve(rng.normal(0, 0.05, 103), [0.5, 0.3, 0.2], "valid") for _ in range(PAIRS)]
    return [one + rng.normal(0, 0.005) for one in noise]


def recorded(rng):
    """Pieces of pairs of processes that were recorded on a machine of two speeds, sides drawn."""
    pairs = json.loads((DATA / "two_speed_groups.json").read_text())["pairs"]
    drawn = []
    for number in rng.integers(0, len(pairs), PAIRS):
        logs = np.log(np.array(pairs[number]))
        difference = (logs[:, 2:].mean(1) - logs[:, :2].mean(1)) * rng.choice([-1, 1])
        begins = rng.integers(0, len(difference), 8)
        pieces = [np.roll(difference, -begin)[:12] for begin in begins]
        drawn.append(np.concatenate(pieces))
    return drawn


SLOW = [pytest.param(draw, marks=pytest.mark.slow) for draw in (normal, few, outliers, drifting)]


@pytest.mark.parametrize("draw", [recorded, *SLOW])
def test_identical_code_is_called_changed_no_more_often_than_said(draw):
    runs = 250
    allowed = MOST + 2.6 * math.sqrt(MOST / runs)  # what 2.5 % may look like in so many runs
    assert max(false_alarms(draw, runs, 3)) <= allowed
