"""Sessions as the unit: how often identical code fails on noisy machines, made-up and recorded; what history
adds; and sessions that do not belong together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perf.errors import Exit
from perf.gate import stats
from perf.gate.comparison import Comparison, Outcome
from perf.gate.design import UndecidedError
from perf.gate.entries import Benchmark
from perf.gate.noise import Noise, Spread, key_of
from perf.gate.saved_runs import Run, merge, parse
from perf.gate.sessions import BetweenSessions
from perf.gate.verdict import compare, compare_saved

RECORDED = Path(__file__).parent / "data" / "two_speed_rounds.json"
LEVEL = 0.025  # one-sided
RUNS = 700
LIMIT = math.log(1.03)
NAME, PRINT = "t.py::test_it", {"cpu": "any"}
Rounds = list[float]
Draw = Callable[[], Rounds]


def session(rounds: Rounds, metric: str = "tokens_per_s", **more: object) -> Run:
    what = {"schema": 1, "group": "g", "model": "m", "backend": "engine", "workload": "w"}
    record = {**what, "fingerprint": PRINT, "rounds": {metric: rounds}, **more}
    return parse({"benchmarks": [{"fullname": NAME, "extra_info": record}]}, "x.json")


def several(*rounds: Rounds, metric: str = "tokens_per_s", **more: object) -> Run:
    return merge([session(some, metric, **more) for some in rounds])


def benchmark(*rounds: Rounds) -> Benchmark:
    return Benchmark(
        NAME, "g", {}, {"tokens_per_s": sum(map(tuple, rounds), ())}, PRINT,
        sessions=tuple({"tokens_per_s": tuple(some)} for some in rounds),
    )  # fmt: skip


def history(*groups: list[Rounds]) -> Noise:
    return Noise({key_of(NAME, PRINT): [[benchmark(some) for some in group] for group in groups]})


def alarms(draw: Draw, n: int, m: int, groups: int, runs: int) -> tuple[float, float]:
    """The shares of runs of identical code that are judged slower, and faster, than 3 % allow."""
    slower = faster = 0
    for _ in range(runs):
        design = BetweenSessions(history(*([draw() for _ in range(3)] for _ in range(groups))))
        sides = (benchmark(*(draw() for _ in range(count))) for count in (n, m))
        found = design.estimate(*sides, "tokens_per_s")
        slower += found.high < 0 and -found.log_ratio > LIMIT
        faster += found.low > 0 and found.log_ratio > LIMIT
    return slower / runs, faster / runs


def at_most(rate: float, runs: int) -> float:
    """What a rate may be seen as in so many seeded runs: three standard errors more."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / runs)


COUNTS = [(1, 1, 2), (1, 2, 0), (2, 1, 0), (2, 2, 0), (3, 1, 0), (3, 1, 2), (5, 1, 0), (3, 3, 0), (5, 5, 0)]
COUNTS += [(2, 2, 2), (1, 5, 4)]


@pytest.mark.parametrize("between", [0.05, 0.20])
@pytest.mark.parametrize(("n", "m", "groups"), COUNTS)
def test_identical_code_fails_no_more_often_than_stated_however_sessions_differ(n, m, groups, between):
    rng = np.random.default_rng(7)

    def draw() -> Rounds:
        return np.exp(rng.normal(rng.normal(0, between), 0.01, 5)).tolist()

    assert max(alarms(draw, n, m, groups, RUNS)) <= at_most(LEVEL, RUNS)


@pytest.mark.parametrize("rounds", [7, 20])
@pytest.mark.parametrize(("n", "m", "groups"), COUNTS)
def test_nor_does_it_on_a_recorded_machine_of_two_paces(n, m, groups, rounds):
    """Sessions cut out of six processes that ran the same code, one mostly slow."""
    processes = [process["tokens_per_s"] for process in json.loads(RECORDED.read_text())["processes"]]
    rng = np.random.default_rng(rounds)

    def draw() -> Rounds:
        process = processes[rng.integers(len(processes))]
        begin = rng.integers(len(process) - rounds + 1)
        return process[begin : begin + rounds]

    assert max(alarms(draw, n, m, groups, RUNS)) <= at_most(LEVEL, RUNS)


def test_rounds_taken_for_independent_would_cry_wolf_there():
    """Why the session is the unit: one session a side, each round counted."""
    processes = [process["tokens_per_s"] for process in json.loads(RECORDED.read_text())["processes"]]
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        one, other = (processes[i][begin : begin + 20] for i, begin in rng.integers(0, [6, 41], (2, 2)))
        a, b = stats.means([one, other])
        found = stats.student(b.value - a.value, math.sqrt(a.variance + b.variance), a.df + b.df)
        wrong += found.high < 0 or found.low > 0
    assert wrong / 300 > 4 * 2 * LEVEL


def dedicated() -> Noise:
    """Four groups of three sessions with a standard deviation of 0.4 %."""
    z = np.random.default_rng(1).normal(0, 0.004, (4, 3))
    runs = [[session([90.0 * math.exp(x)] * 5) for x in group] for group in z]
    return Noise({key_of(NAME, PRINT): [[run.benchmarks[NAME] for run in group] for group in runs]})


@pytest.mark.parametrize(
    ("factor", "outcome"), [(0.90, Outcome.FAIL), (1.0, Outcome.PASS), (1.1, Outcome.PASS)]
)
def test_a_machine_known_to_be_quiet_needs_one_session_a_side(factor, outcome):
    base, head = ([100.0 * by * x for x in (0.999, 1.0, 1.002, 1.0, 0.998)] for by in (1.0, factor))
    found = compare_saved(session(base), session(head), dedicated())
    assert (found.outcome, found.verdicts[0].rounds, found.design) == (outcome, (1, 1), "sessions")
    assert compare(session(base), session(head)).exit is Exit.INCONCLUSIVE  # and elsewhere nobody knows


def test_the_estimate_is_that_of_pooled_variances_and_students_t():
    """Worked by hand: logs 0, 0.02 against 0.1, 0.1; 0.03 and 0.05 in the past."""
    a, b, past = ([[math.exp(x)] for x in side] for side in ((0.0, 0.02), (0.1, 0.1), (0.03, 0.05)))
    found = BetweenSessions().estimate(benchmark(*a), benchmark(*b), "tokens_per_s")
    assert found.log_ratio == pytest.approx(0.09)
    assert (found.error, found.df) == (pytest.approx(math.sqrt(0.0002 / 2)), 2)
    assert found.high - found.log_ratio == pytest.approx(4.302653 * found.error, rel=1e-6)
    found = BetweenSessions(history(past)).estimate(benchmark(*a), benchmark(*b), "tokens_per_s")
    assert (found.error, found.df) == (pytest.approx(math.sqrt(0.0004 / 3)), 3)
    two_against_one = BetweenSessions().estimate(benchmark(*a), benchmark(b[0]), "tokens_per_s")
    assert (two_against_one.error, two_against_one.df) == (pytest.approx(math.sqrt(0.0002 * 1.5)), 1)
    lone = BetweenSessions(history(past, past, past)).estimate(benchmark(*a), benchmark(b[0]), "tokens_per_s")
    assert lone.df == 2  # half of four: one value need not be normal, as means of several nearly are


def test_rounds_that_vary_more_than_sessions_do_are_the_floor():
    """All sessions agree to the last digit, by chance: their rounds say how sure each is."""
    noisy = [100.0, 130.0, 90.0, 110.0, 105.0]
    (mean,) = stats.means([noisy])
    found = BetweenSessions().estimate(benchmark(noisy, noisy), benchmark(noisy, noisy), "tokens_per_s")
    assert found.error == pytest.approx(math.sqrt(mean.variance))
    assert found.df == 2
    still = [math.exp(mean.value)] * 5
    some = BetweenSessions().estimate(benchmark(noisy, noisy), benchmark(still, still), "tokens_per_s")
    assert 0 < some.error < found.error  # of those whose own rounds vary, alone


def test_what_is_seen_today_outranks_a_quieter_past():
    quiet = history(*[[[100.0], [100.1]]] * 10)
    sides = benchmark([100.0], [130.0], [90.0]), benchmark([110.0], [85.0], [125.0])
    today, both = (BetweenSessions(noise).estimate(*sides, "tokens_per_s") for noise in (None, quiet))
    assert (both.error, both.df) == (today.error, today.df)
    loud = history([[100.0], [150.0]])
    assert BetweenSessions(loud).estimate(*sides, "tokens_per_s").df == 5


def test_memory_that_is_the_same_in_every_session_is_known_to_be():
    size = 2**30
    before = several([size], [size], metric="gpu_peak_bytes")
    after = session([size + 2**25], "gpu_peak_bytes")
    assert compare(before, merge([after, after])).exit is Exit.REGRESSION
    assert compare(before, before).exit is Exit.PASS
    assert compare(session([size], "gpu_peak_bytes"), after).exit is Exit.INCONCLUSIVE
    nothing = several([0], [0], metric="gpu_peak_bytes")
    assert compare(nothing, nothing).exit is Exit.PASS


def test_two_against_one_is_unsure_and_says_how_many_would_tell():
    (verdict,) = compare(several([100.0], [103.0]), session([90.0])).verdicts
    assert (verdict.outcome, verdict.rounds) == (Outcome.INCONCLUSIVE, (2, 1))
    assert verdict.high - verdict.low > 0.5
    assert f"about {verdict.rounds_needed} sessions a side would probably tell" in verdict.reason
    assert 2 <= verdict.rounds_needed <= 3


@pytest.mark.parametrize("effect", [0.10, 0.15])
def test_the_sessions_said_to_be_needed_mostly_tell(effect):
    rng = np.random.default_rng(3)

    def run(count: int, slower: float = 0.0) -> Run:
        return several(*([100.0 * math.exp(rng.normal(0, 0.04)) * (1 - slower)] for _ in range(count)))

    needed = [v.rounds_needed for _ in range(40) for v in compare(run(3), run(3, effect)).verdicts]
    typical = int(np.median([count for count in needed if count]))
    told = [compare(run(typical), run(typical, effect)).outcome is Outcome.FAIL for _ in range(60)]
    assert typical > 3
    assert np.mean(told) > 0.6


def test_the_verdict_counts_sessions_and_shows_the_mean_of_their_values():
    (verdict,) = compare(several([100.0] * 5, [121.0] * 7), several([110.0] * 3, [110.0])).verdicts
    assert (verdict.base, verdict.head) == (pytest.approx(110.0), pytest.approx(110.0))
    assert verdict.rounds == (2, 2)
    assert verdict.effect == pytest.approx(0.0, abs=1e-12)


def plain(comparison: Comparison) -> dict[str, object]:
    found = comparison.plain()
    return {key: found[key] for key in ("design", "exit")} | {
        side: found[side]["sessions"] for side in ("base", "head")
    }


def test_the_record_of_a_comparison_has_the_sessions_of_each_side():
    found = plain(compare(several([100.0], [103.0]), session([90.0])))
    assert found == {"design": "sessions", "exit": 4, "base": 2, "head": 1}


def only_reason(base: Run, head: Run) -> str:
    comparison = compare(base, head)
    assert comparison.exit is Exit.NOT_COMPARABLE
    return next(v.reason for v in comparison.verdicts if v.outcome is Outcome.ERROR and v.benchmark == NAME)


def test_sessions_that_do_not_belong_together_are_an_error_and_never_a_mix():
    good = session([100.0] * 5)
    for change, says in (
        ({"fingerprint": {"cpu": "x"}}, "base has another fingerprint in some sessions: cpu any -> x"),
        ({"model": "other"}, "base is another thing in some sessions: model m -> other"),
        ({"schema": 9}, "base is of schema 9"),
    ):
        odd = session([100.0] * 5, **change)
        for sessions in ([good, odd, good], [good, good, odd], [odd, good, good]):
            assert says.split(":")[0] in only_reason(merge(sessions), good)
        assert says in only_reason(merge([good, odd]), good)
    elsewhere = session([100.0] * 5, fingerprint={"gpu": "one"})
    assert "head has another fingerprint" in only_reason(good, merge([good, elsewhere]))


def test_what_some_sessions_lack_is_an_error_that_says_in_how_many_it_was():
    good = session([100.0] * 5)
    fewer = session([100.0] * 5)
    (both,) = session([4.0] * 5, "goodput").benchmarks.values()
    rounds = {"tokens_per_s": (100.0,) * 5, **both.rounds}
    more = replace(good, benchmarks={NAME: replace(both, rounds=rounds)})
    reason = only_reason(merge([more, fewer, more]), merge([more, more]))
    assert reason == "goodput was recorded in 2 of 3 sessions only in base"
    other = parse({"benchmarks": [{"fullname": "t.py::other", "stats": {"data": [1.0]}}]}, "x.json")
    reason = only_reason(merge([good, good, other]), good)
    assert reason.startswith("base was measured in 2 of 3 sessions only")
    unfit = session([100.0, math.nan])
    assert "has nan among its rounds" in only_reason(merge([good, unfit]), good)


def test_every_value_of_a_counter_counts_in_whatever_session():
    def counted(*values: list[int]) -> Run:
        return several(*values, metric="forward_passes")

    assert compare(counted([64, 64], [64]), counted([64])).exit is Exit.PASS
    assert compare(counted([64, 64], [64]), counted([64], [65])).exit is Exit.REGRESSION
    reason = only_reason(counted([64, 64], [65, 65]), counted([64]))
    assert reason.startswith("differs between rounds of base (64 to 65)")


def test_numbers_shown_are_the_median_sessions_and_voided_rounds_of_all():
    sessions = [session([1.0], rounds_voided=n, wall_s=s) for s, n in ((9.0, 0), (7.0, 2), (8.0, 1))]
    (found,) = merge(sessions).benchmarks.values()
    assert (found.info["wall_s"], found.info["rounds_voided"]) == (8.0, 3)


def test_a_single_session_is_as_it_was():
    one = session([1.0, 2.0])
    assert merge([one]) is one
    assert one.sessions == 1
    (found,) = one.benchmarks.values()
    assert found.rounds_by_session("tokens_per_s") == [(1.0, 2.0)]


def test_nothing_known_is_undecided():
    with pytest.raises(UndecidedError, match="noise is unknown") as error:
        BetweenSessions().estimate(benchmark([1.0] * 9), benchmark([2.0] * 9), "tokens_per_s")
    assert error.value.needed == 3
    assert Spread.of([[1.0], [2.0], []]) == Spread(0.0, 0.0)
