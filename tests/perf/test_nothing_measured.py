"""A session that measures nothing: harmless whatever pytest-benchmark's options, unless a gate was asked
for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.errors import GateError
from perf.gate import saved_runs

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("imported", "processor_unasked")

SUITE = """
import pytest
def test_time(benchmark):
    benchmark.pedantic(lambda: sum(range(100)), rounds=6)
def test_plain(): pass
"""
XDIST = "def pytest_addoption(parser): parser.addoption('--dist', default='no')"  # as far as it is looked at
SAVING = ("--benchmark-save=x", "--benchmark-autosave", "--benchmark-json=x.json")


def run(pytester: pytest.Pytester, *arguments: str, suite: str = SUITE) -> tuple[int, str]:
    """The exit code and the output of a session in this process, which may end before it begins."""
    pytester.makepyfile(test_it=suite)
    pytester.makeconftest(XDIST)
    plugins = ("-p", "no:xdist", "-p", "perf.plugin")  # the former has the option of XDIST, too
    result = pytester.runpytest_inprocess(*plugins, *arguments, no_reraise_ctrlc=True)
    return int(result.ret), result.stdout.str() + result.stderr.str()


def saved() -> list[Path]:
    return [*Path.cwd().rglob("*_*.json"), *Path.cwd().glob("x.json")]


@pytest.mark.filterwarnings("ignore:Benchmarks are automatically disabled because xdist")
@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize(("how", "code", "why"), [
    (["--benchmark-disable"], 0, ", with --benchmark-disable"),
    (["--benchmark-skip"], 0, ", with --benchmark-skip"), (["--dist=load"], 0, ", with -n (xdist)"),
    (["--collect-only"], 0, ""), (["-k", "nothing"], 5, ""),
    (["-k", "plain"], 0, ""), (["--benchmark-only", "-k", "plain"], 0, ""),
])  # fmt: skip
def test_saving_nothing_is_said_in_a_line_and_changes_no_exit_code(
    pytester: pytest.Pytester, saving: str, how: list[str], code: int, why: str
):
    strict = [] if "--dist=load" in how else ["-Werror"]  # of xdist pytest-benchmark itself warns
    ended, text = run(pytester, saving, *how, *strict)
    assert ended == code, text
    assert text.count("so nothing was saved") == 1
    assert f"{saving.split('=')[0]}: nothing was measured{why}, so nothing was saved" in text
    assert saved() == []


def test_options_of_the_ini_file_are_as_harmless(pytester: pytest.Pytester):
    pytester.makeini("[pytest]\naddopts = --benchmark-disable --benchmark-autosave")
    assert run(pytester)[0] == 0
    assert run(pytester, suite="def test_bad(): raise AssertionError")[0] == 1
    assert saved() == []
    code, text = run(pytester, "--benchmark-enable")
    assert code == 0
    assert "so nothing was saved" not in text
    assert len(saved()) == 1


def test_only_failures_are_nothing_to_save(pytester: pytest.Pytester):
    failing = SUITE.replace("def test_plain", "    assert False\ndef test_plain")
    code, text = run(pytester, "--benchmark-save=x", suite=failing)
    assert code == 1
    assert "--benchmark-save: nothing was measured, so nothing was saved" in text
    assert saved() == []
    run(pytester, "--benchmark-json=x.json", suite=failing)
    with pytest.raises(GateError, match="is empty"):  # and never an older one
        saved_runs.load("x.json")


GONE = "raise TargetError('http://there does not answer')"
WRONG = "raise InputError('workload=17 must be text')"


@pytest.mark.parametrize(("bodies", "code"), [
    ((GONE,), 3), ((WRONG,), 2), ((GONE, WRONG), 2), ((GONE, "assert 0"), 1), ((GONE, "benchmark(int)"), 3),
])  # fmt: skip
def test_what_the_user_can_mend_is_said_in_a_line_with_its_code(
    pytester: pytest.Pytester, bodies: tuple[str, ...], code: int
):
    suite = "from engine import InputError\nfrom perf.servers.ready import TargetError\n"
    for number, body in enumerate(bodies):
        suite += f"def test_{number}(benchmark):\n    {body}\n"
    found, text = run(pytester, "--benchmark-save=x", suite=suite)
    assert found == code
    assert ("error: http://there does not answer" in text) == (GONE in bodies)
    assert ("error: workload=17 must be text" in text) == (WRONG in bodies)
    assert ("Traceback" in text, "suite.py" in text) == (False, False)


def test_without_pytest_benchmark_the_plugin_asks_for_nothing(pytester: pytest.Pytester):
    plain = "import pytest\n@pytest.fixture\ndef benchmark(): return 3\n"
    plain += "def test_it(benchmark): assert benchmark == {}\n"
    assert run(pytester, "-p", "no:benchmark", suite=plain.format(3))[0] == 0
    assert run(pytester, "-p", "no:benchmark", suite=plain.format(4))[0] == 1
    code, text = run(pytester, "-p", "no:benchmark", "--perf-baseline=x")
    assert code == 2
    assert "--perf-baseline=x needs pytest-benchmark" in text


@pytest.mark.parametrize(("how", "code", "says"), [
    (["--dist=load"], 2, "run without -n"), (["--collect-only"], 2, "run without --collect-only"),
    (["--perf-baseline="], 2, "names nothing"), (["-k", "nothing"], 3, "is empty"),
    (["-k", "plain"], 3, "is empty"),
    (["--help", "--perf-baseline=nope"], 0, "--perf-baseline=NAME"),
])  # fmt: skip
def test_a_gate_that_was_asked_for_and_cannot_be_answered_is_an_error(
    pytester: pytest.Pytester, how: list[str], code: int, says: str
):
    assert run(pytester, "--benchmark-save=x", "--benchmark-save-data")[0] == 0
    ended, text = run(pytester, "--perf-baseline=x", *how)
    assert ended == code, text
    assert says in text


def test_benchmark_only_outranks_benchmark_skip_for_the_gate_too(pytester: pytest.Pytester):
    assert run(pytester, "--benchmark-save=x", "--benchmark-save-data")[0] == 0
    code, text = run(pytester, "--perf-baseline=x", "--benchmark-only", "--benchmark-skip")
    assert "round time" in text or "PASS" in text
    assert code in (0, 1, 4)


def test_what_last_failed_alone_leaves_the_rest_unjudged(pytester: pytest.Pytester):
    def suite(assertion: str) -> str:
        pytester.makepyfile(test_other=SUITE.replace("test_time", "test_apart"))
        return SUITE.replace("def test_plain(): pass", f"    assert {assertion}\n")

    assert run(pytester, "--benchmark-save=x", "--benchmark-save-data", suite=suite("True"))[0] == 0
    assert run(pytester, suite=suite("False"))[0] == 1
    code, text = run(pytester, "--lf", "--perf-baseline=x", suite=suite("True"))
    assert code in (0, 1, 4), text
    assert "deselected here and not judged: test_other.py::test_apart" in text


def test_an_empty_run_is_never_the_last_of_its_name(pytester: pytest.Pytester):
    assert run(pytester, "--benchmark-save=main")[0] == 0
    assert run(pytester, "--benchmark-save=main", "--benchmark-skip")[0] == 0
    assert saved_runs.load("main").path.name == "0001_main.json"
    assert json.loads(saved()[0].read_text())["benchmarks"]


def test_a_clock_that_stands_still_is_no_improvement(pytester: pytest.Pytester):
    assert run(pytester, "--benchmark-save=x", "--benchmark-save-data")[0] == 0
    still = SUITE.replace("def test_time", "@pytest.mark.benchmark(timer=lambda: 1.0)\ndef test_time")
    code, text = run(pytester, "--perf-baseline=x", suite=still)
    assert code == 3
    assert "test_time" in text
    assert "round time has 0.0 among its rounds" in text
