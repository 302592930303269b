"""A test's own tolerances: every mark that is accepted is used, whatever kind of benchmark and wherever it
stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perf.benchmarks.workloads import fixed
from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.comparison import Outcome
from perf.gate.verdict import compare
from perf.measure import machine_speed
from perf.measure.case import PerfCase
from perf.measure.machine_speed import MachineSpeed
from perf.measure.session import BenchSession
from tests.perf import fake_runs
from tests.perf.test_case import Fixture, Scripted

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("imported_for_measuring", "imported", "processor_unasked")

HEAD = "import pytest\nmark = pytest.mark.perf_gate\n"
TIMED = "def test_time(benchmark):\n    benchmark.pedantic(lambda: None, rounds=6)\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "measure", lambda *args, **how: MachineSpeed(100.0, 10.0))


def run(pytester: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(test_it=HEAD + source)
    return pytester.runpytest_inprocess("-p", "perf.plugin", "-p", "no:cacheprovider", "-q", *arguments)


def tolerances(pytester: pytest.Pytester, source: str) -> dict[str, Any]:
    """What is saved of each test's marks, by the name of the test."""
    result = run(pytester, source, "--benchmark-json=run.json")
    assert result.ret == 0, result.stdout.str()
    loaded = saved_runs.load(Path("run.json"))
    return {
        name.split("::", 1)[1]: {metric: (limit.rel, limit.abs) for metric, limit in b.tolerances.items()}
        for name, b in loaded.benchmarks.items()
    }


def refused(pytester: pytest.Pytester, source: str, *says: str) -> None:
    """Refused before any test runs, in a line that names the test."""
    result = run(pytester, source + "\ndef test_never(): raise AssertionError('it ran')\n")
    text = result.stdout.str() + result.stderr.str()
    assert result.ret == 2, text
    assert "it ran" not in text
    for word in says:
        assert word in text


def test_a_mark_on_a_plain_benchmark_is_used(pytester: pytest.Pytester):
    source = f"@mark('round_s', rel=0.5)\n{TIMED}def test_other(benchmark): benchmark(int)\n"
    assert tolerances(pytester, source) == {"test_time": {"round_s": (0.5, None)}, "test_other": {}}
    (entry, _) = json.loads(Path("run.json").read_text())["benchmarks"]
    assert [*entry["extra_info"]] == ["dynamic_batch"]
    times = [0.1, 0.101, 0.1, 0.099, 0.1, 0.1]
    for factor, outcome in ((1.4, Outcome.PASS), (1.7, Outcome.FAIL)):
        pair = [{**entry, "stats": {"data": [time * by for time in times]}} for by in (1, factor)]
        runs = (saved_runs.parse({"benchmarks": [side]}, "x.json") for side in pair)
        base, head = map(fake_runs.several, runs)
        (verdict,) = compare(base, head).verdicts
        assert (verdict.outcome, verdict.tolerance) == (outcome, 0.5)


def test_a_mark_holds_however_the_test_comes_by_its_benchmark(pytester: pytest.Pytester):
    source = (
        "@pytest.fixture\ndef timed(benchmark): return benchmark\n"
        "@mark('round_s', abs=1.0)\ndef test_a(timed): timed.pedantic(int, rounds=6)\n"
        "class TestIt:\n    pytestmark = mark('round_s', rel=0.2)\n"
        "    def test_b(self, request): request.getfixturevalue('benchmark').pedantic(int, rounds=6)\n"
        "    def test_c(self, benchmark):\n"
        "        benchmark.extra_info = {'gate': 'mine'}\n        benchmark.pedantic(int, rounds=6)\n"
    )
    wide = {"round_s": (0.2, None)}
    found = tolerances(pytester, source)
    assert found == {"test_a": {"round_s": (None, 1.0)}, "TestIt::test_b": wide, "TestIt::test_c": wide}


def test_the_closest_mark_wins_limit_by_limit(pytester: pytest.Pytester):
    source = (
        "pytestmark = [mark('round_s', rel=0.1, abs=1.0)]\n"
        "def test_module(benchmark): benchmark.pedantic(int, rounds=6)\n"
        "@mark('round_s', rel=0.2)\nclass Base:\n"
        "    def test_it(self, benchmark): benchmark.pedantic(int, rounds=6)\n"
        "    @mark('round_s', abs=3.0)\n"
        "    def test_own(self, benchmark): benchmark.pedantic(int, rounds=6)\n"
        "class TestBase(Base): pass\n"
        "@mark('round_s', rel=0.3)\nclass TestDerived(Base):\n"
        "    @mark('round_s', rel=0.4)\n"
        "    @pytest.mark.parametrize('x', [0, pytest.param(1, marks=mark('round_s', rel=0.5))])\n"
        "    def test_par(self, benchmark, x): benchmark.pedantic(int, rounds=6)\n"
    )
    assert tolerances(pytester, source) == {
        "test_module": {"round_s": (0.1, 1.0)},
        "TestBase::test_it": {"round_s": (0.2, 1.0)},
        "TestBase::test_own": {"round_s": (0.2, 3.0)},
        "TestDerived::test_it": {"round_s": (0.3, 1.0)},
        "TestDerived::test_own": {"round_s": (0.3, 3.0)},
        "TestDerived::test_par[0]": {"round_s": (0.4, 1.0)},
        "TestDerived::test_par[1]": {"round_s": (0.5, 1.0)},
    }


@pytest.mark.parametrize("where", ["@mark('round_s', rel={0})\n@mark('round_s', rel={1})\n" + TIMED,
                                   "pytestmark = [mark('round_s', rel=x) for x in ({0}, {1})]\n" + TIMED,
                                   "@mark('round_s', rel={0})\n@mark('round_s', rel={1})\nclass TestIt:\n"
                                   "    def test_it(self, benchmark): benchmark(int)\n"])  # fmt: skip
def test_equally_close_marks_may_not_contradict_each_other(pytester: pytest.Pytester, where: str):
    refused(pytester, where.format(0.1, 0.2), "gives rel=", "keep one", "test_it.py")
    assert run(pytester, where.format(0.1, 0.1)).ret == 0


@pytest.mark.parametrize(("source", "says"), [
    ("@mark('round_s', rel=0.1)\ndef test_it(): pass\n", "takes neither perf_case nor benchmark"),
    ("@mark('tokens_per_s', rel=0.1)\n" + TIMED, "records its time alone, round_s"),
    ("@mark('round_s', rel=0.1)\ndef test_it(perf_case, device): pass\n", "round_s is none of that"),
    ("import unittest\nclass TestIt(unittest.TestCase):\n"
     "    @mark('round_s', rel=0.1)\n    def test_it(self): pass\n", "takes neither"),
    ("@pytest.mark.parametrize('x', [0, pytest.param(1, marks=mark('round_s', rel=0.1))])\n"
     "def test_it(x): pass\n", "test_it[1]"),
    ("pytestmark = mark('round_s', rel=0.1)\ndef test_it(): pass\n", "no benchmark here records that metric"),
    ("pytestmark = mark('goodput', rel=0.1)\n" + TIMED, "no benchmark here records that metric"),
    ("@mark('round_s', rel=0.1)\nclass TestA:\n    def test_it(self): pass\n" + TIMED, "test_it.py::TestA"),
])  # fmt: skip
def test_a_mark_that_could_have_no_effect_is_refused(pytester: pytest.Pytester, source: str, says: str):
    refused(pytester, source, "would have no effect", says, "test_it.py")


def test_a_mark_on_a_class_or_module_is_for_those_that_record_the_metric(pytester: pytest.Pytester):
    source = (
        "pytestmark = [mark('round_s', rel=0.1), mark('tokens_per_s', rel=0.2)]\n"
        f"{TIMED}def test_other(): pass\ndef test_case(perf_case, device): pytest.skip('')\n"
    )
    assert tolerances(pytester, source) == {"test_time": {"round_s": (0.1, None)}}
    for part in (["test_it.py::test_other"], ["-k", "other"]):  # the part asked for need not have one
        assert run(pytester, source, *part).ret == 0
    base = "@mark('round_s', rel=0.1)\nclass Base:\n    def test_none(self): pass\n"
    derived = "class TestA(Base): pass\nclass TestB(Base):\n    def test_b(self, benchmark): benchmark(int)\n"
    assert run(pytester, base + derived).ret == 0


def test_a_tests_own_mark_must_be_of_what_it_recorded():
    bench = BenchSession(
        model="random:tiny-llama", dtype=None, rounds=None, quick=False, inject_slowdown=0.0, min_time=0.0
    )
    limits = json.dumps({"goodput": {"rel": 0.1}, "ttft_p50_ms": {"rel": 0.3}})

    def measure(own: tuple[str, ...], fixture: Fixture) -> None:
        case = PerfCase(bench, fixture, limits, own)
        case.measure("g", Scripted(), fixed(1, 4, 2, 256), device="cpu", max_batch_size=1)

    fixture = Fixture()
    says = r"perf_gate\('goodput'\) has no effect: this benchmark records tokens_per_s,"
    with pytest.raises(GateError, match=says) as error:
        measure(("goodput",), fixture)
    assert (error.value.code, fixture.has_error, fixture.extra_info) == (Exit.USAGE, True, {})
    measure((), fixture)
    (record,) = fixture.extra_info.values()
    assert json.loads(record["gate"]) == {"ttft_p50_ms": {"rel": 0.3}}


def test_a_mark_that_finds_its_place_taken_fails_its_test(pytester: pytest.Pytester):
    source = "@mark('round_s', rel=0.1)\ndef test_it(benchmark):\n    {}\n    benchmark(int)\n"
    result = run(pytester, source.format("benchmark.extra_info['dynamic_batch'] = True"))
    assert result.ret == Exit.USAGE
    assert "is where the gate keeps its record" in result.stdout.str()


@pytest.mark.parametrize(("own", "factor", "outcome"), [
    ({"abs": 0.002}, 1.04, Outcome.FAIL), ({"abs": 0.002}, 1.01, Outcome.PASS),
    ({"abs": 0.05}, 1.3, Outcome.PASS), ({"rel": 0.01}, 1.04, Outcome.FAIL),
    ({"rel": 0.01, "abs": 0.005}, 1.04, Outcome.PASS),
    ({"rel": 0.0}, 1.04, Outcome.FAIL), ({"abs": 0.0}, 1.04, Outcome.FAIL),
])  # fmt: skip
def test_a_limit_given_alone_holds_alone(own: dict[str, float], factor: float, outcome: Outcome):
    """As with pytest.approx: beside abs alone no fraction is allowed, of both the wider holds."""
    record = {"schema": 2, "gate": json.dumps({"round_s": own})}
    entry = {"fullname": "t", "extra_info": {"dynamic_batch": record}}
    times = [0.1, 0.1001, 0.1, 0.0999, 0.1, 0.1]
    runs = (
        saved_runs.parse({"benchmarks": [{**entry, "stats": {"data": data}}]}, "x.json")
        for data in (times, [time * factor for time in times])
    )
    base, head = map(fake_runs.several, runs)
    assert compare(base, head).verdicts[0].outcome is outcome


@pytest.mark.parametrize(
    "option",
    [
        "--rounds=0",
        "--rounds=-1",
        "--min-time=-1",
        "--min-time=nan",
        "--min-time=inf",
        "--min-time=x",
        "--perf-inject-slowdown=-0.1",
        "--perf-inject-slowdown=nan",
        "--perf-inject-slowdown=0.1@prefill",
    ],
)
def test_a_number_that_would_be_taken_for_none_is_refused(pytester: pytest.Pytester, option: str):
    assert run(pytester, TIMED, option).ret == pytest.ExitCode.USAGE_ERROR
