"""The course of an A/B by rounds: it ends when all is decided, at the latest with its budget."""

from __future__ import annotations

import math

import pytest

from perf.ab import experiment
from perf.ab.experiment import Experiment, Plan
from perf.gate.comparison import Outcome
from tests.perf.fake_turns import FakePairs, install, no_sides

PLAN = Plan(budget_s=60.0, pairs=3, round_s=0.02)


def course(pairs, *runs, seed=0):
    said = []
    for _ in experiment.run(no_sides, runs, said.append, seed):
        pass
    return said


@pytest.fixture
def fake(monkeypatch):
    """`fake(effect, **noise)`: pairs of made-up processes of one benchmark, `t::a`, installed."""
    return lambda effect, names=("t::a",), **noise: install(
        monkeypatch, FakePairs(names, lambda name, slowdown: effect, **noise)
    )


def outcomes(one, items=("t::a",)):
    return {v.metric.name: v.outcome for v in one.judged(list(items)).verdicts}


def test_a_large_change_ends_it_with_the_second_pair_of_processes(fake):
    """With the first nothing is: one pair of processes may lie luckily in memory."""
    pairs, one = fake(math.log(1.2)), Experiment(PLAN)
    assert course(pairs, one) == ["processes 1 of 3", "processes 2 of 3"]
    assert set(outcomes(one).values()) == {Outcome.FAIL}
    assert (one.pairs, one.decided) == (2, {"t::a"})
    assert pairs.now < 24
    assert one.seconds == pytest.approx(pairs.now, abs=0.2)


def test_what_cannot_be_decided_ends_with_the_budget(fake):
    pairs, one = fake(math.log(1.02), noise=0.4), Experiment(PLAN)
    assert len(course(pairs, one)) == 3
    assert Outcome.INCONCLUSIVE in outcomes(one).values()
    assert 58 < pairs.now < 62
    needed = [v.rounds_needed for v in one.judged(["t::a"]).verdicts if v.outcome is Outcome.INCONCLUSIVE]
    assert all(number is None or number > 100 for number in needed)


def test_what_fails_ends_without_what_the_rest_of_the_budget_would_not_decide(fake):
    """5 % fails by tokens/s, which may lose 2 %, and is just what TTFT P50 may gain."""
    pairs, one = fake(math.log(1.05), noise=0.02), Experiment(PLAN)
    course(pairs, one)
    found = outcomes(one)
    assert (found["tokens_per_s"], found["itl_p99_ms"]) == (Outcome.FAIL, Outcome.PASS)
    assert pairs.now < 35


def test_nothing_is_given_up_where_nothing_fails(fake):
    pairs, one = fake(math.log(1.019), noise=0.02), Experiment(PLAN)
    course(pairs, one)
    assert outcomes(one)["tokens_per_s"] is Outcome.INCONCLUSIVE
    assert 58 < pairs.now < 62


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "outcome", "least"), [
    (1.0, Outcome.PASS, 16), (1.03, Outcome.FAIL, 14), (1.05, Outcome.FAIL, 19), (1.10, Outcome.FAIL, 20),
])  # fmt: skip
def test_twenty_runs_of_a_minute_say_what_is_true(monkeypatch, factor, outcome, least):
    """With the noise that two shared cores showed: 8 % a group, half a percent between processes."""
    found = []
    for seed in range(20):
        pairs = FakePairs(
            ["t::a"], lambda name, slowdown: math.log(factor), noise=0.08, between=0.005, seed=seed
        )
        install(monkeypatch, pairs)
        one = Experiment(PLAN)
        course(pairs, one, seed=seed)
        found.append(one.judged(["t::a"]).outcome)
    assert found.count(outcome) >= least
    wrong = Outcome.FAIL if outcome is Outcome.PASS else Outcome.PASS
    assert found.count(wrong) <= 1


def test_benchmarks_share_the_budget_and_those_decided_are_left_out(monkeypatch):
    names = ["t::a", "t::b", "t::c"]
    effect = {"t::a": math.log(1.3), "t::b": 0.0, "t::c": math.log(1.02)}
    pairs = install(monkeypatch, FakePairs(names, lambda name, _: effect[name], noise=0.05))
    one = Experiment(PLAN)
    course(pairs, one)
    groups = {name: [pair for pair, measured, _ in pairs.measured if measured == name] for name in names}
    assert set(groups["t::a"]) == {1, 2}
    assert len(groups["t::c"]) > len(groups["t::a"])
    assert pairs.now < 62
    assert {v.benchmark for v in one.judged(names).verdicts} == set(names)


def test_a_budget_that_start_up_eats_still_measures_a_little_of_everything(monkeypatch):
    names = [f"t::{letter}" for letter in "abcdef"]
    pairs = install(monkeypatch, FakePairs(names, lambda *_: 0.0))
    one = Experiment(Plan(budget_s=5.0, pairs=3, round_s=0.02))
    course(pairs, one)
    least = 2 * experiment.LEAST_GROUPS
    assert all(len([m for m in pairs.measured if m[1] == name]) >= least for name in names)
    assert pairs.started == 2  # the budget being spent, no third pair of processes is begun


def test_experiments_share_processes_and_each_has_its_own_budget_and_end(monkeypatch):
    sizes = {None: 0.0, "0.2": math.log(1.2), "0.02": math.log(1.02)}
    pairs = install(monkeypatch, FakePairs(["t::a"], lambda _, slowdown: sizes[slowdown], noise=0.3))
    runs = [Experiment(PLAN, slowdown) for slowdown in sizes]
    course(pairs, *runs)
    assert pairs.started == 3
    first = [next(s for pair, _, s in pairs.measured if pair == number) for number in (1, 2, 3)]
    assert first == [None, "0.2", "0.02"] or len(set(first)) > 1  # who begins changes
    for one in runs:
        mine = [pair for pair, _, slowdown in pairs.measured if slowdown == one.slowdown]
        assert one.pairs == max(mine)
        assert one.seconds < PLAN.budget_s + 2
    assert sum(sum(one.measured_s.values()) for one in runs) > 60
