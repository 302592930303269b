"""Which groups of rounds the machine spoiled: rules that look at neither side's times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perf.ab.groups import Disturbances, Group, Turn
from perf.ab.in_turn import InTurn, Series, tell_disturbances, tell_too_rare
from perf.gate.design import UndecidedError

QUIET = Turn(0.1, 0.1, ({"tokens_per_s": 1.0},), (1e-3, 1e-3), 0.0, 0, 0)


def group(*changed, order=(0, 1, 1, 0), **how):
    """Four quiet turns, of which those of these numbers are changed."""
    turns = tuple(replace(QUIET, **how) if number in changed else QUIET for number in range(4))
    return Group(order, turns)


@pytest.mark.parametrize(("how", "reason"), [
    ({}, None), ({"switches": 9}, None), ({"switches": 10}, "context switches"),
    ({"faults": 1}, "page faults"),
    ({"stolen_s": 0.02}, None), ({"stolen_s": 0.03}, "steal"), ({"canary_s": (1e-3, 1.7e-3)}, None),
    ({"canary_s": (1e-3, 1.9e-3)}, "pace"), ({"canary_s": (0.5e-3, 1e-3)}, "pace"),
    ({"samples": ({"tokens_per_s": 1.0, "voided": "thermal"},)}, "hardware slowdown"),
    ({"seconds": 9.0, "cpu_s": 20.0, "samples": ({"tokens_per_s": 1e9},)}, None),  # times are not looked at
])  # fmt: skip
@pytest.mark.parametrize("which", range(4))
def test_each_mark_counts_on_whichever_side_it_falls(which, how, reason):
    assert group(which, **how).spoiled() == reason


@pytest.mark.parametrize("how", [{"switches": 99}, {"canary_s": (1e-3, 9e-3)}])
def test_a_servers_own_work_is_no_sign_that_the_machine_was_taken_away(how):
    assert group(1, served=True, **how).spoiled() is None
    assert group(1, served=True, **how).disturbed_sides() == []
    assert group(1, served=True, stolen_s=0.03, **how).spoiled() == "steal"


def test_spoiled_groups_are_left_out_and_counted_with_their_time():
    groups = [group()] * 6 + [group(1, faults=1), group(0, canary_s=(1e-3, 2e-3))]
    found = Disturbances.of(groups)
    assert (found.groups, found.spoiled, found.share) == (
        8,
        {"page faults": 1, "pace": 1},
        pytest.approx(0.25),
    )
    assert found.kept(groups) == groups[:6]
    (said,) = tell_disturbances({"t::a": found})
    what = "2 of 8 groups of rounds (1 by page faults, 1 by pace), 25% of its time"
    assert said == f"t::a: the machine took {what}, and left out"
    assert list(tell_disturbances({"t::a": Disturbances.of([group()])})) == []


@pytest.mark.parametrize(("order", "whose"), [((0, 1, 1, 0), "head"), ((1, 0, 0, 1), "base")])
def test_marks_that_fall_on_one_side_may_be_its_codes_and_nothing_is_left_out(order, whose):
    groups = [group(order=order)] * 40 + [group(1, 2, order=order, faults=3)] * 8
    found = Disturbances.of(groups)
    assert found.kept(groups) == groups
    assert found.why_kept == f"{whose} was disturbed far more often, which may be its own doing"


def test_where_most_groups_are_spoiled_this_is_how_the_machine_is():
    groups = [group(0, canary_s=(1e-3, 3e-3))] * 3 + [group()] * 2
    found = Disturbances.of(groups)
    assert found.kept(groups) == groups
    assert "this is how the machine is" in found.why_kept
    (said,) = tell_disturbances({"t::a": found})
    assert "judged all the same" in said


def test_a_pair_without_enough_values_of_a_tail_says_nothing_of_it():
    """A pair of processes that measured few groups beside one that measured many."""
    few, many = [replace(QUIET, samples=({"itl_p99_ms": [1.0 + n] * n},)) for n in (10, 500)]
    series = Series(24)
    for turn, count in ((few, 3), (many, 30)):
        series.pairs.append([])
        for _ in range(count):
            series.add(Group((0, 1, 1, 0), (turn,) * 4))
    assert [len(pair) for pair in series.sections("itl_p99_ms")] == [0, 30]
    design = InTurn(24)
    design.series["t::a"] = series
    assert design.combined("t::a", "itl_p99_ms").log_ratio == 0.0
    series.pairs.pop()
    series.add(Group((0, 1, 1, 0), (few,) * 4))
    with pytest.raises(UndecidedError, match="0 groups of rounds: too few to tell anything"):
        design.combined("t::a", "itl_p99_ms")


@pytest.mark.parametrize(("values", "look", "judged"), [
    (1000, 12, True), (100, 12, False), (100, 2, True), (101, 12, False), (250, 24, True), (249, 24, False),
])  # fmt: skip
def test_a_tail_of_which_the_plan_has_too_few_values_is_not_judged(values, look, judged):
    """A thousand gaps make an ITL P99, and six of those a verdict: 12 groups of two turns a side."""
    turn = replace(QUIET, samples=({"tokens_per_s": 1.0, "itl_p99_ms": [1.0] * values},))
    series = Series(24)
    series.look = look
    series.pairs.append([])
    for _ in range(12):
        series.add(Group((0, 1, 1, 0), (turn,) * 4))
    assert ("itl_p99_ms" in series.metrics) is judged
    assert "tokens_per_s" in series.metrics
    planned = 24 * values * 24 // look
    said = f"t::a: ITL P99 is not judged: a tail of about {planned:,} values a side; it needs 6,000"
    assert list(tell_too_rare("t::a", series)) == ([] if judged else [said])


def test_the_rounds_of_a_side_are_those_of_its_turns():
    turns = tuple(replace(QUIET, samples=({"tokens_per_s": float(number)},) * 2) for number in range(4))
    one = Group((1, 0, 0, 1), turns)
    assert [sample["tokens_per_s"] for sample in one.of(0)] == [1.0, 1.0, 2.0, 2.0]
    assert [sample["tokens_per_s"] for sample in one.of(1)] == [0.0, 0.0, 3.0, 3.0]
    assert one.seconds == pytest.approx(0.4)
