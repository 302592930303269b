"""The statistics on made-up data with known answers: how often they cry wolf, how often they see one, all
seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from perf.gate import stats

LEVEL = 0.025  # one-sided, of a 95 % interval
RUNS = 700


def normal(rng, n):
    return rng.normal(0, 0.02, n)


def spiky(rng, n):
    """A neighbour disturbs one round in seven by 5 to 40 %."""
    return rng.normal(0, 0.01, n) + np.where(rng.random(n) < 0.15, rng.uniform(0.05, 0.4, n), 0)


def skewed(rng, n):
    return rng.exponential(0.02, n)


def heavy(rng, n):
    return 0.01 * rng.standard_t(2, n)


def drifting(rng, n):
    """Rounds that follow one another: lag-1 autocorrelation 0.5."""
    x = [rng.normal(0, 0.02)]
    for step in rng.normal(0, 0.02 * math.sqrt(0.75), n - 1):
        x.append(0.5 * x[-1] + step)
    return np.array(x)


def times(noise, n, rng, slower=0.0):
    return np.exp(noise(rng, n)) * (1 + slower)


def at_most(rate, runs=RUNS):
    """What a rate may be seen as in so many seeded runs: three standard errors more."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / runs)


def yuen(base, head):
    """Yuen's interval from two means: what a session's own rounds say of it, put to the test."""
    a, b = stats.means([base, head])
    variance = a.variance + b.variance
    df = variance**2 / (a.variance**2 / a.df + b.variance**2 / b.df) if variance else a.df + b.df
    return stats.student(b.value - a.value, math.sqrt(variance), max(1.0, df))


def shares(noise, n, seed, judge=yuen, slower=0.0, runs=RUNS):
    """The share of runs whose interval lies wholly on the bad side, and of those whose interval holds the
    truth."""
    rng = np.random.default_rng(seed)
    found = [judge(times(noise, n, rng), times(noise, n, rng, slower)) for _ in range(runs)]
    truth = math.log1p(slower)
    return np.mean([e.low > 0 for e in found]), np.mean([e.low <= truth <= e.high for e in found])


@pytest.mark.parametrize("noise", [normal, spiky, skewed, heavy])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 12), (20, 10), (6, 40)])
def test_the_estimate_is_scipys_where_rounds_are_independent(noise, n, m, monkeypatch):
    monkeypatch.setattr(stats, "inflation", lambda samples: 1.0)
    rng = np.random.default_rng(n)
    base, head = times(noise, n, rng), times(noise, m, rng, 0.03)
    found = yuen(base, head)
    theirs = scipy.stats.ttest_ind(np.log(head), np.log(base), equal_var=False, trim=0.2)
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == (
        pytest.approx(interval.low, abs=1e-13),
        pytest.approx(interval.high, abs=1e-13),
    )
    assert found.df == pytest.approx(theirs.df, rel=1e-12)
    assert found.tail(+1) + found.tail(-1) == pytest.approx(1)
    assert 2 * min(found.tail(+1), found.tail(-1)) == pytest.approx(theirs.pvalue, abs=1e-13)


def test_the_estimate_is_yuens():
    """Worked by hand: ten values a side, two cut from each end; without serial correlation to inflate it."""
    base = [0.5, 3.0, 1.0, 2.0, 9.0, 2.5, 1.5, 4.0, 0.1, 3.5]
    x = np.array([1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 3.5, 3.5])  # winsorised
    variance = x.var(ddof=1) * 9 / (6 * 5)
    error = math.sqrt(2 * variance)
    found = yuen(np.exp(base), np.exp(np.array(base) + 0.7))
    assert found.log_ratio == pytest.approx(0.7)
    assert (found.error, found.df) == (pytest.approx(error), pytest.approx(10))
    assert found.high - found.log_ratio == pytest.approx(2.228139 * error, rel=1e-6)


@pytest.mark.parametrize("noise", [normal, spiky, skewed, heavy])
@pytest.mark.parametrize("n", [5, 7, 10, 20])
def test_identical_code_is_called_slower_no_more_often_than_stated(noise, n):
    slower, covered = shares(noise, n, seed=n)
    assert slower <= at_most(LEVEL)
    assert covered >= 1 - at_most(2 * LEVEL)


@pytest.mark.parametrize(("n", "times_too_often"), [(4, 2.5), (5, 1.7), (7, 1.4)])
def test_the_percentile_bootstrap_would_cry_wolf_twice_as_often(n, times_too_often):
    """Why it is not used: same data, same level."""

    def bootstrap(base, head):
        rng = np.random.default_rng(0)
        a, b = np.log(base), np.log(head)
        means = [x[rng.integers(0, n, (400, n))].mean(1) for x in (a, b)]
        low, high = np.quantile(means[1] - means[0], [LEVEL, 1 - LEVEL])
        return stats.Estimate(0, 0, 1, low, high, 0.5, 0.5)

    slower, _ = shares(normal, n, seed=1, judge=bootstrap)
    assert slower > times_too_often * LEVEL
    assert shares(normal, n, seed=1)[0] <= at_most(LEVEL)


@pytest.mark.parametrize("n", [10, 20])
def test_rounds_that_drift_together_count_for_fewer(n, monkeypatch):
    slower, covered = shares(drifting, n, seed=n)
    assert slower < 0.055
    assert covered > 0.89
    monkeypatch.setattr(stats, "inflation", lambda samples: 1.0)
    assert shares(drifting, n, seed=n)[0] > 0.08


@pytest.mark.parametrize("noise", [normal, spiky, skewed])
@pytest.mark.parametrize("n", [4, 6, 8, 12])
def test_pairs_are_calibrated_and_blind_to_what_both_share(noise, n):
    def paired(base, head):
        shared = np.exp(np.linspace(0, 0.5, n))  # the machine slows down by two thirds meanwhile
        return stats.compare_pairs(base * shared, head * shared)

    slower, covered = shares(noise, n, seed=n, judge=paired)
    assert slower <= at_most(LEVEL)
    assert covered >= 1 - at_most(2 * LEVEL)


@pytest.mark.parametrize(("noise", "n", "effect", "power"), [
    (normal, 7, 0.10, 0.97), (normal, 10, 0.05, 0.92), (skewed, 7, 0.10, 0.97), (heavy, 10, 0.05, 0.95),
    (spiky, 10, 0.10, 0.75),
])  # fmt: skip
def test_a_real_effect_is_seen(noise, n, effect, power):
    slower, covered = shares(noise, n, seed=3, slower=effect, runs=600)
    assert slower >= power
    assert covered >= 1 - at_most(2 * LEVEL, 600)


def test_the_rounds_said_to_be_needed_would_mostly_do():
    rng = np.random.default_rng(5)
    few = yuen(times(normal, 7, rng), times(normal, 7, rng, 0.02))
    needed = few.rounds_needed(7, gap=math.log(1.02))
    assert needed is not None
    assert needed > 7
    assert 0.7 <= shares(normal, needed, seed=6, slower=0.02, runs=300)[0] <= 1.0


def test_no_number_of_rounds_tells_what_lies_on_the_limit():
    estimate = yuen([1.0, 1.1, 1.0, 1.2, 1.1], [1.0, 1.1, 1.1, 1.2, 1.0])
    assert estimate.rounds_needed(5, 0.0) is None
    assert estimate.rounds_needed(5, 1e-5) is None


def test_benjamini_and_hochbergs_own_example():
    """Their table of 1995: fifteen p-values, of which four stand at 5 %."""
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
    ]
    p += [0.7590, 1.0]
    assert stats.false_discoveries(p, 0.05) == [True] * 4 + [False] * 11
    assert stats.false_discoveries([*reversed(p)], 0.05) == [False] * 11 + [True] * 4
    assert stats.false_discoveries([], 0.05) == []


def test_a_whole_suite_of_identical_code_seldom_has_a_false_alarm():
    rng = np.random.default_rng(7)
    p = [[yuen(times(normal, 7, rng), times(normal, 7, rng)).tail(+1) for _ in range(20)] for _ in range(120)]
    alone = np.mean([min(run) <= LEVEL for run in p])
    together = np.mean([any(stats.false_discoveries(run)) for run in p])
    assert alone > 0.2  # more than one run in five would be red by chance
    assert together <= at_most(LEVEL, 120)


def test_of_a_change_that_all_show_nothing_is_lost():
    assert all(stats.false_discoveries([0.02] * 200))
    assert not any(stats.false_discoveries([0.02, *[0.5] * 199]))


def test_the_typical_value_ignores_a_disturbed_round():
    assert stats.centre([1.0, 1.0, 1.0, 1.0, 50.0]) == 1.0
    assert stats.centre([2.0, 8.0]) == pytest.approx(4.0)
    assert stats.centre([0.0, 0.0]) == 0.0


def test_rounds_without_any_spread_are_sure():
    estimate = yuen([4.0] * 5, [5.0] * 5)
    assert (estimate.low, estimate.high) == (pytest.approx(math.log(1.25)), pytest.approx(math.log(1.25)))
    assert estimate.error == 0.0
    assert (estimate.tail(+1), estimate.tail(-1)) == (0.0, 1.0)
    assert yuen([4.0] * 5, [4.0] * 5).tail(+1) == 1.0


def test_zero_counts_as_very_small():
    nothing = yuen([0.0] * 5, [0.0] * 5)
    assert (nothing.low, nothing.high) == (0.0, 0.0)
    lost = yuen([10.0, 11.0, 10.5, 9.5, 10.0], [0.0] * 5)
    assert lost.high < math.log(0.6)


values = st.lists(st.floats(0.01, 1e6), min_size=5, max_size=12)


@settings(max_examples=60, deadline=None)
@given(values, values, st.floats(0.001, 1000))
def test_units_do_not_matter_and_direction_only_turns_the_sign(base, head, unit):
    one = yuen(base, head)
    scaled = yuen(np.array(base) * unit, np.array(head) * unit)
    turned = yuen(head, base)
    assert one.low <= one.log_ratio <= one.high
    assert (scaled.low, scaled.high) == (pytest.approx(one.low, abs=1e-6), pytest.approx(one.high, abs=1e-6))
    assert (turned.low, turned.high) == (
        pytest.approx(-one.high, abs=1e-6),
        pytest.approx(-one.low, abs=1e-6),
    )
