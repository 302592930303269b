"""The gate's own test, tested: trials share nothing, and rates are counted right."""

from __future__ import annotations

import json
import math

import pytest

from perf.ab import selftest
from perf.ab.experiment import Plan
from perf.errors import Exit, GateError
from perf.gate import stats
from perf.gate.comparison import Outcome
from tests.perf.fake_turns import FakePairs, install
from tests.perf.test_verdict import NAME, bench, run

PLAN = Plan(budget_s=120.0, pairs=3, round_s=0.02)


def slowed(_, slowdown):
    """What a slowdown does to a made-up process: 0.2@chunks to a quarter of its time."""
    size, at, _ = (slowdown or "0").partition("@")
    return math.log1p(float(size) / (4 if at else 1))


@pytest.fixture
def fake(monkeypatch):
    """Trials without processes."""
    return install(monkeypatch, FakePairs(["t::a"], slowed, noise=0.03, between=0.003))


def test_rates_budgets_and_visible_effects_are_counted(fake):
    said = []
    effects = ["0", "0.01", "0.2", "0.8@chunks"]
    report = selftest.selftest(effects, 4, plan=PLAN, idle_budget_s=60.0, advance=said.append)
    nothing, little, much, chunks = report.rates
    assert [rate.regressions for rate in report.rates] == [0, 0, 4, 4]
    assert set(nothing.outcomes) | set(little.outcomes) <= {Outcome.PASS, Outcome.INCONCLUSIVE}
    assert much.failed["tokens_per_s"] == 4
    assert (nothing.budget_s, much.budget_s, nothing.better) == (60.0, 120.0, 0)
    assert max(nothing.seconds) < 62
    assert max(much.seconds) < 60
    assert chunks.failed.keys() == {"tokens_per_s", "ttft_p50_ms", "itl_p99_ms"}
    one, two, five = report.visible["tokens_per_s"]
    assert 0.02 < five < two < one < 0.05  # the tolerance and a little
    assert (said[0], said[-1], len(said)) == ("trial 1 of 4", "trial 4 of 4", 4)
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert plain["rates"][2]["regressions"] == 4
    assert plain["visible"]["tokens_per_s"]["1"] == one
    assert report.good(0.95)


def test_what_was_injected_reaches_head_alone_and_who_begins_changes(fake):
    selftest.selftest(["0", "0.1"], 2, plan=PLAN)
    assert {slowdown for _, _, slowdown in fake.measured} == {None, "0.1"}
    assert fake.started >= 4  # no trial uses the processes of another


def test_identical_code_can_have_more_trials_than_what_is_slowed_down(fake):
    said = []
    report = selftest.selftest(["0.2", "0"], 1, plan=PLAN, idle_trials=3, advance=said.append)
    assert [len(rate.outcomes) for rate in report.rates] == [1, 3]
    assert (report.asked, report.trials, said[-1]) == (3, 3, "trial 3 of 3")


def test_a_budget_shorter_than_start_up_shows_no_effect(fake):
    report = selftest.selftest(["0"], 1, plan=Plan(30.0, 12, 0.02))
    assert report.visible["tokens_per_s"][0] is None
    assert report.visible["tokens_per_s"][2] is not None


@pytest.mark.parametrize(("regressions", "good"), [((0, 20), True), ((2, 20), False), ((1, 18), False)])
def test_a_self_test_is_good_if_it_leaves_alone_what_is_the_same_and_finds_the_largest(regressions, good):
    outcomes = [[Outcome.FAIL] * hits + [Outcome.PASS] * (20 - hits) for hits in regressions]
    rates = [
        selftest.Rate(e, 60.0, tuple(o), (9.0,) * 20) for e, o in zip(("0", "0.1"), outcomes, strict=True)
    ]
    parts = selftest.Rate(
        "0.9@chunks", 60.0, (Outcome.PASS,) * 20, (9.0,) * 20
    )  # of some steps: not the largest
    assert selftest.Report(3, (*rates, parts), {}).good(0.95) is good


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0, 0.1684), (1, 0.0013, 0.2487), (19, 0.7513, 0.9987),
                                                   (20, 0.8316, 1)])  # fmt: skip
def test_bounds_are_clopper_and_pearsons(hits, low, high):
    assert stats.binomial_bounds(hits, 20) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(("options", "says"), [
    ({"trials": 0}, "trials=0 must be 1 or more"), ({"effects": []}, "must be different slowdowns"),
    ({"effects": ["0.1", "0.1"]}, "must be different slowdowns"),
    ({"trials": 3, "idle_trials": 2}, "idle_trials=2 must be trials=3 or more"),
    ({"trials": 1, "idle_trials": 2, "effects": ["0.1"]}, "idle_trials=2 are of identical code, effect 0"),
    ({"args": ["perf", "--perf-inject-slowdown=0.1"]}, "leave it out"),
])  # fmt: skip
def test_what_makes_no_sense_is_a_usage_error(options, says):
    with pytest.raises(GateError, match=says) as error:
        selftest.selftest(**options, plan=PLAN)
    assert error.value.code is Exit.USAGE


def test_how_much_fresh_processes_differ_is_told_for_compare():
    rounds = [
        {"tokens_per_s": [math.exp(v)] * 40 + [1e9] * 40, "forward_passes": [7.0] * 80}
        for v in (1.0, 1.2, 1.1)
    ]
    runs = [run(bench(one)) for one in rounds]
    (found,) = selftest.between_processes(runs)
    assert (found.benchmark, found.metric, found.df) == (NAME, "tokens_per_s", 2)
    assert found.variance == pytest.approx(0.01)
    assert list(selftest.between_processes(runs[:1])) == []


@pytest.mark.slow
def test_a_real_trial_finds_a_large_slowdown_of_the_engine():
    report = selftest.selftest(["0.5", "3@5"], 1, plan=Plan(60.0, 2, 0.02))
    assert [rate.outcomes for rate in report.rates] == [(Outcome.FAIL,)] * 2
    assert report.rates[0].failed["tokens_per_s"] == 1
