"""The gate's verdicts on made-up runs: what is a regression, what is not, what cannot be told, and no way to
go green on nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from perf.errors import Exit
from perf.gate import saved_runs
from perf.gate.comparison import Outcome
from perf.gate.design import PairedBlocks
from perf.gate.metrics import METRICS
from perf.gate.sessions import BetweenSessions
from perf.gate.verdict import compare

NAME = "perf/benchmarks/test_policy.py::test_policy[continuous]"
PRINT = {"gpu": "NVIDIA H200", "torch": "2.11.0", "dtype": "float16"}
COUNTS = {"forward_passes": [64] * 7, "output_tokens": [1199] * 7}


def noisy(centre, seed, noise=0.005, n=7):
    return (centre * np.exp(np.random.default_rng(seed).normal(0, noise, n))).tolist()


def bench(rounds, name=NAME, gate=None, **info):
    what = {"schema": 1, "group": "policy", "model": "random:tiny", "backend": "engine", "workload": "mixed"}
    what |= {"arrivals": "all", "fingerprint": PRINT, **info}
    return {
        "fullname": name,
        "extra_info": {**what, **({"gate": json.dumps(gate)} if gate else {}), "rounds": rounds},
    }


def run(*entries, name="run", sessions=3):
    """A run of so many sessions that agree to the last digit: what is uncertain is in their rounds."""
    data = {"benchmarks": list(entries), "commit_info": {"id": "abc"}}
    return saved_runs.merge([saved_runs.parse(data, Path(f"{name}.json"))] * sessions)


def judge(base, head, sessions=3, **options):
    """The comparison of two runs of one benchmark, from the rounds of each of their sessions."""
    base, head = (
        run(bench(rounds), name=name, sessions=sessions) for rounds, name in ((base, "base"), (head, "head"))
    )
    return compare(base, head, **options)


def judge_blocks(base, head):
    return judge(base, head, sessions=1, design=PairedBlocks())


def only(comparison):
    (verdict,) = comparison.verdicts
    return verdict


@pytest.mark.parametrize(("metric", "factor", "outcome", "improved"), [
    ("tokens_per_s", 0.90, Outcome.FAIL, False), ("tokens_per_s", 1.10, Outcome.PASS, True),
    ("tpot_p50_ms", 1.10, Outcome.FAIL, False), ("tpot_p50_ms", 0.90, Outcome.PASS, True),
    ("ttft_p95_ms", 1.20, Outcome.FAIL, False), ("ttft_p95_ms", 1.05, Outcome.PASS, False),
    ("tokens_per_s", 1.00, Outcome.PASS, False), ("goodput", 0.93, Outcome.FAIL, False),
    ("decode_bandwidth_pct", 0.98, Outcome.PASS, False), ("startup_s", 1.2, Outcome.FAIL, False),
    ("round_s", 1.2, Outcome.FAIL, False),
])  # fmt: skip
def test_each_metric_is_judged_in_its_own_direction(metric, factor, outcome, improved):
    verdict = only(judge({metric: noisy(100, 1)}, {metric: noisy(100 * factor, 2)}))
    assert (verdict.outcome, verdict.improved) == (outcome, improved)
    assert verdict.effect == pytest.approx(factor - 1, abs=0.01)
    assert verdict.low < verdict.effect < verdict.high
    word = "worse" if verdict.outcome is Outcome.FAIL else "better" if improved else "at most"
    assert word in verdict.reason


def test_a_regression_within_the_tolerance_is_none():
    """1.5 % is certain here, and allowed."""
    verdict = only(judge({"tokens_per_s": noisy(100, 1, 0.001)}, {"tokens_per_s": noisy(98.5, 2, 0.001)}))
    assert verdict.outcome is Outcome.PASS
    assert verdict.high < 0


def test_noise_is_neither_a_pass_nor_a_fail_and_says_what_would_decide():
    comparison = judge({"tokens_per_s": noisy(100, 1, 0.05)}, {"tokens_per_s": noisy(101, 2, 0.05)})
    verdict = only(comparison)
    assert (comparison.outcome, comparison.exit) == (Outcome.INCONCLUSIVE, Exit.INCONCLUSIVE)
    assert verdict.rounds == (3, 3)
    assert verdict.rounds_needed > 3
    assert f"about {verdict.rounds_needed} sessions a side would probably tell" in verdict.reason


def test_one_session_a_side_decides_nothing_however_clear_it_looks():
    """Nobody knows how another session would have fared; both values are shown, and how to find out."""
    verdict = only(judge({"tokens_per_s": [100.0] * 50}, {"tokens_per_s": [50.0] * 50}, sessions=1))
    assert (verdict.outcome, verdict.rounds, verdict.rounds_needed) == (Outcome.INCONCLUSIVE, (1, 1), 3)
    assert (verdict.base, verdict.head, verdict.effect) == pytest.approx((100.0, 50.0, -0.5))
    assert verdict.low is None
    assert verdict.reason.startswith("can't tell: one session a side, and this machine's noise is unknown; ")
    assert "python -m perf save NAME --sessions 3, or python -m perf ab" in verdict.reason
    counted = judge(COUNTS, {**COUNTS, "forward_passes": [65] * 7}, sessions=1)
    assert counted.exit is Exit.REGRESSION  # what is exact needs no second session


def test_a_change_below_the_floor_is_no_regression():
    """Half a millisecond of TTFT is 50 % here, and nothing to anybody."""
    verdict = only(judge({"ttft_p50_ms": noisy(1.0, 1)}, {"ttft_p50_ms": noisy(1.4, 2)}))
    assert (verdict.outcome, verdict.tolerance) == (Outcome.PASS, pytest.approx(0.5, abs=0.01))
    assert only(judge({"ttft_p50_ms": noisy(100, 1)}, {"ttft_p50_ms": noisy(140, 2)})).outcome is Outcome.FAIL
    memory = {"gpu_peak_bytes": [2**30] * 7}
    assert only(judge(memory, {"gpu_peak_bytes": [2**30 + 2**23] * 7})).outcome is Outcome.PASS
    assert only(judge(memory, {"gpu_peak_bytes": [2**30 + 2**25] * 7})).outcome is Outcome.FAIL


def test_a_test_may_have_tolerances_of_its_own():
    base, head = {"ttft_p95_ms": noisy(100, 1)}, {"ttft_p95_ms": noisy(115, 2)}
    for own, outcome in (
        ({"ttft_p95_ms": {"rel": 0.2}}, Outcome.PASS),
        ({"ttft_p95_ms": {"abs": 30.0}}, Outcome.PASS),
        ({"ttft_p95_ms": {"rel": 0.05, "abs": 1.0}}, Outcome.FAIL),
        ({"goodput": {"rel": 0.5}}, Outcome.FAIL),
    ):
        comparison = compare(run(bench(base, gate=own)), run(bench(head, gate=own)))
        assert only(comparison).outcome is outcome
    loosened = compare(run(bench(base)), run(bench(head, gate={"ttft_p95_ms": {"rel": 0.2}})))
    assert loosened.notes == (f"tolerances are others than in the baseline: {NAME}",)


@pytest.mark.parametrize(("head", "says"), [
    ([65] * 7, "1 more than 64: if meant, save a new baseline"), ([60] * 7, "4 fewer than 64"),
    ([64] * 6 + [70], "6 more than 64, and not the same in every round (64 to 70)"),
])  # fmt: skip
def test_any_difference_of_a_counter_is_a_regression(head, says):
    comparison = judge(COUNTS, {**COUNTS, "forward_passes": head})
    assert comparison.exit is Exit.REGRESSION
    assert [v.outcome for v in comparison.verdicts] == [Outcome.FAIL, Outcome.PASS]
    assert says in comparison.verdicts[0].reason


def test_a_counter_that_wavers_in_the_baseline_is_an_error():
    verdict = only(judge({"preemptions": [1, 2, 1, 1, 1]}, {"preemptions": [1] * 5}))
    assert verdict.outcome is Outcome.ERROR
    assert "differs between rounds of base (1 to 2)" in verdict.reason


def test_counters_are_left_out_under_open_load_and_when_asked():
    open_load = [
        run(bench(rounds, arrivals="poisson:8"))
        for rounds in (COUNTS, {**COUNTS, "forward_passes": [70] * 7})
    ]
    assert compare(*open_load).verdicts == ()
    timed = {"tokens_per_s": noisy(100, 1)}
    comparison = judge(
        {**timed, **COUNTS}, {**timed, "forward_passes": [9] * 7, "output_tokens": [9] * 7}, counters=False
    )
    assert comparison.exit is Exit.PASS
    assert comparison.notes == ("counters were not judged",)


def test_nothing_compared_is_never_a_pass():
    comparison = judge(COUNTS, COUNTS, counters=False)
    assert (comparison.verdicts, comparison.outcome, comparison.exit) == (
        (),
        Outcome.ERROR,
        Exit.NOT_COMPARABLE,
    )


@pytest.mark.parametrize(("before", "after", "says"), [
    ({}, {"fingerprint": {**PRINT, "torch": "2.13.0"}}, "fingerprint is another: torch 2.11.0 -> 2.13.0"),
    ({}, {"fingerprint": {**PRINT, "gpu": None, "cpu": "EPYC"}}, "cpu none -> EPYC, gpu NVIDIA H200 -> none"),
    ({}, {"model": "smollm2"}, "another thing was run: model random:tiny -> smollm2"),
    ({"batch_size": 8}, {"batch_size": 16}, "batch_size 8 -> 16"), ({}, {"schema": 9}, "head is of schema 9"),
    ({"fingerprint": {}}, {}, "base has no per-round data"),
])  # fmt: skip
def test_other_machines_and_other_work_are_refused(before, after, says):
    rounds = {"tokens_per_s": noisy(100, 1), **COUNTS}
    comparison = compare(run(bench(rounds, **before)), run(bench(rounds, **after)))
    assert comparison.exit is Exit.NOT_COMPARABLE
    assert only(comparison).metric is None
    assert says in only(comparison).reason


def test_a_benchmark_that_is_gone_is_an_error_and_a_new_one_a_note():
    rounds = {"tokens_per_s": noisy(100, 1)}
    both, one = run(bench(rounds), bench(rounds, name="t::b")), run(bench(rounds))
    gone = compare(both, one)
    assert gone.exit is Exit.NOT_COMPARABLE
    assert [(v.benchmark, v.outcome) for v in gone.verdicts] == [
        (NAME, Outcome.PASS),
        ("t::b", Outcome.ERROR),
    ]
    assert "in the baseline and not in this run" in gone.verdicts[1].reason
    new = compare(one, both)
    assert (new.exit, new.notes) == (Exit.PASS, ("new, so not judged: t::b",))
    left_out = compare(both, one, deselected={"t::b", "t::c"})
    assert (left_out.exit, left_out.notes) == (Exit.PASS, ("deselected here and not judged: t::b",))
    assert (
        compare(both, run(bench(rounds, name="t::c")), deselected={NAME, "t::b"}).exit is Exit.NOT_COMPARABLE
    )


def test_a_metric_that_is_gone_or_not_a_number_is_an_error():
    rounds = {"tokens_per_s": noisy(100, 1), "goodput": noisy(4, 2)}
    gone = judge(rounds, {"tokens_per_s": rounds["tokens_per_s"]})
    assert gone.exit is Exit.NOT_COMPARABLE
    assert gone.verdicts[1].reason == "goodput was not recorded in head"
    for base, head, side in ((rounds, {**rounds, "goodput": [math.nan] * 7}, "head"),
                             ({**rounds, "goodput": [math.nan] * 7}, rounds, "base")):  # fmt: skip
        comparison = judge(base, head)
        assert comparison.exit is Exit.NOT_COMPARABLE
        (verdict,) = (v for v in comparison.verdicts if v.outcome is Outcome.ERROR)
        assert verdict.reason.startswith("goodput has nan among its rounds")
        assert verdict.reason.endswith(f"in {side}")


UNFIT = [0.0, -1.0, -0.0, math.nan, math.inf, -math.inf, None, "0.1", True, [0.1], 10**400]


@pytest.mark.parametrize("bad", UNFIT, ids=lambda bad: repr(bad)[:9])
@pytest.mark.parametrize("metric", ["round_s", "tokens_per_s", "ttft_p50_ms", "decode_bandwidth_pct"])
def test_a_time_that_is_not_positive_and_finite_cannot_be_judged(metric, bad):
    """Not even as much better, on whichever side and in however many of the rounds."""
    good = noisy(100, 1)
    for rounds in ([bad] * 7, [*good[:3], bad, *good[3:]]):
        for sides, side in (((good, rounds), "head"), ((rounds, good), "base"), ((rounds, rounds), "base")):
            comparison = judge(*({metric: values} for values in sides))
            verdict = only(comparison)
            assert (comparison.exit, verdict.benchmark) == (Exit.NOT_COMPARABLE, NAME)
            assert verdict.reason.startswith(f"{METRICS[metric].label} has ")
            assert verdict.reason.endswith(f", which is not a finite number above 0 in {side}")
    times = [{"fullname": NAME, "stats": {"data": values}} for values in (good, [bad] * 7)]
    plain = compare(*map(run, times))
    assert (plain.exit, only(plain).benchmark) == (Exit.NOT_COMPARABLE, NAME)


@pytest.mark.parametrize("metric", ["forward_passes", "kv_bytes_peak", "goodput", "gpu_peak_bytes"])
def test_what_may_be_nothing_may_be_0_and_no_other_number_that_is_none(metric):
    assert only(judge({metric: [0] * 7}, {metric: [0] * 7})).outcome is Outcome.PASS
    for bad in UNFIT[3:]:
        comparison = judge({metric: [1] * 7}, {metric: [1, 1, bad, 1, 1, 1, 1]})
        assert comparison.exit is Exit.NOT_COMPARABLE
        assert "which is not a finite number of 0 or more in head" in only(comparison).reason


def test_goodput_that_falls_to_nothing_is_a_regression():
    verdict = only(judge({"goodput": noisy(4, 1)}, {"goodput": [0.0] * 7}))
    assert (verdict.outcome, verdict.head) == (Outcome.FAIL, 0.0)
    assert only(judge({"goodput": [0.0] * 7}, {"goodput": [0.0] * 7})).outcome is Outcome.PASS


def test_the_gravest_finding_decides_the_exit_code():
    """A regression outranks what could not be compared, and that outranks what could not be told."""
    good, bad = {"tokens_per_s": noisy(100, 1)}, {"tokens_per_s": noisy(80, 2)}
    vague = {"tokens_per_s": noisy(100, 3, 0.1)}

    def code(*names):
        heads = {"bad": bad, "vague": vague, "good": good}
        base = run(*(bench(good, name=name) for name in names))
        return compare(base, run(*(bench(heads[name], name=name) for name in names if name != "gone"))).exit

    assert code("good") is Exit.PASS
    assert code("good", "vague") is Exit.INCONCLUSIVE
    assert code("good", "vague", "gone") is Exit.NOT_COMPARABLE
    assert code("good", "vague", "gone", "bad") is Exit.REGRESSION


def test_one_of_many_that_looks_bad_by_chance_is_looked_at_again():
    """Alone it would be a regression; among sixty others just like it, one such is to be expected."""
    base, head = noisy(100, 3, 0.03), noisy(94, 8, 0.03)
    alone = only(judge({"tokens_per_s": base}, {"tokens_per_s": head}))
    assert alone.outcome is Outcome.FAIL
    others = [noisy(100, 100 + i, 0.001) for i in range(60)]
    sides = [
        run(*(bench({"tokens_per_s": rounds}, name=str(i)) for i, rounds in enumerate([suspect, *others])))
        for suspect in (base, head)
    ]
    comparison = compare(*sides)
    assert comparison.exit is Exit.INCONCLUSIVE
    assert (
        "alone a regression, but of 61 comparisons one may look so by chance" in comparison.verdicts[0].reason
    )


def test_when_the_canary_moved_more_than_the_metric_the_machine_is_named():
    canaries = [{"canary_matmul_gflops": rate, "canary_copy_gbps": 20.0} for rate in (140.0, 110.0)]
    rounds = [{"tokens_per_s": noisy(rate, seed)} for rate, seed in ((100, 1), (90, 2))]
    moved = compare(*(run(bench(r, **c)) for r, c in zip(rounds, canaries, strict=True)))
    assert moved.exit is Exit.REGRESSION
    assert only(moved).reason.endswith("; but the machine changed: canary matmul -21.4%")
    assert moved.notes == ("the machine changed: canary matmul -21.4% from base to head",)
    still = compare(*(run(bench(r, **canaries[0])) for r in rounds))
    assert "machine" not in only(still).reason
    assert still.notes == ()


def test_voided_rounds_are_told():
    sides = [run(bench({"tokens_per_s": noisy(100, 1)}, rounds_voided=voided)) for voided in (0, 2)]
    assert compare(*sides).notes == (f"rounds of head were voided by a slowdown of the hardware: {NAME}",)


def test_pairs_see_through_a_machine_that_drifts():
    """Throughput halves meanwhile; the 6 % between the two is steady."""
    drift = np.linspace(1, 0.5, 8)
    base = (np.array(noisy(100, 1, n=8)) * drift).tolist()
    head = (np.array(noisy(94, 2, n=8)) * drift).tolist()
    base, head = {"tokens_per_s": base}, {"tokens_per_s": head}
    assert only(judge_blocks(base, head)).outcome is Outcome.FAIL
    assert only(judge(base, head)).outcome is Outcome.INCONCLUSIVE
    shorter = {"tokens_per_s": head["tokens_per_s"][1:]}
    assert "make no pairs" in only(judge_blocks(base, shorter)).reason
    few = only(judge_blocks(*({"tokens_per_s": side["tokens_per_s"][:3]} for side in (base, head))))
    assert (few.outcome, few.rounds_needed) == (Outcome.INCONCLUSIVE, 4)


def test_a_comparison_is_plain_json():
    rounds = {"goodput": [0.0] * 7, **COUNTS}
    own = {"goodput": {"abs": 1}}
    comparison = compare(run(bench(rounds)), run(bench(rounds, gate=own)))
    found = json.loads(json.dumps(comparison.plain(), allow_nan=False))
    assert (found["outcome"], found["exit"], found["base"]["commit"]) == ("PASS", 0, "abc")
    assert [record["metric"] for record in found["verdicts"]] == ["goodput", *COUNTS]
    assert found["verdicts"][0]["tolerance"] is None  # a limit in units above a baseline of 0 allows anything


rounds = st.lists(st.floats(1, 1000), min_size=5, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    rounds,
    rounds,
    st.floats(1.0, 3.0),
    st.sampled_from(["tokens_per_s", "ttft_p95_ms", "startup_s"]),
    st.sampled_from([(3, BetweenSessions()), (1, PairedBlocks())]),
)
def test_what_gets_worse_never_gets_a_better_verdict(base, head, factor, metric, design):
    base, head = base[: len(head)], head[: len(base)]
    rank = [Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.FAIL]
    worse = [value / factor if metric == "tokens_per_s" else value * factor for value in head]
    before, after = (
        only(judge({metric: base}, {metric: values}, design[0], design=design[1])).outcome
        for values in (head, worse)
    )
    assert rank.index(after) >= rank.index(before)


@pytest.mark.parametrize("metric", ["tokens_per_s", "tpot_p50_ms", "latency_p95_ms"])
@pytest.mark.parametrize("design", [(3, BetweenSessions()), (1, PairedBlocks())])
@pytest.mark.parametrize(
    "values", [(5e-324, 1.7e308), (1.7e308, 5e-324), (5e-324, 5e-324), (1.7e308, 1.7e308)]
)
def test_the_largest_and_the_smallest_numbers_are_judged_like_others(metric, design, values):
    base, head = ([value] * 6 for value in values)
    verdict = only(judge({metric: base}, {metric: head}, design[0], design=design[1]))
    worse = values[0] > values[1] if metric == "tokens_per_s" else values[0] < values[1]
    assert verdict.outcome is (Outcome.FAIL if worse else Outcome.PASS)
    canaries = [bench({metric: [1.0] * 6}, canary_copy_gbps=value) for value in values]
    comparison = compare(run(canaries[0]), run(canaries[1]))
    assert comparison.outcome is Outcome.PASS
    assert bool(comparison.notes) == (values[0] != values[1])
    assert json.dumps(comparison.plain(), allow_nan=False)
