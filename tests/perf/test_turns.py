"""Two live pytest processes that take turns: what they tell, who waits for whom, and what goes wrong."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from perf.ab import turn_agent, turns
from perf.ab.import_proof import environment
from perf.ab.main import ab
from perf.errors import Exit, GateError
from perf.gate.comparison import Outcome
from perf.gate.pytest_process import pytest_command
from tests.perf.repos import commit, git

pytestmark = pytest.mark.usefixtures("few_plugins")

TESTS = """
import os, time
import pytest, thing

def work():
    end = time.process_time() + 0.002 * thing.FACTOR
    while time.process_time() < end:
        pass

def test_plain(benchmark):
    benchmark(work)

@pytest.mark.perf_gate("round_s", rel=0.9)
def test_marked(benchmark):
    benchmark.pedantic(work, rounds=3)

def test_told(benchmark):
    calls = []
    def teardown():
        calls.append(1)
        gaps = [1.0 * thing.FACTOR] * 1000
        return {"tokens_per_s": 100 / thing.FACTOR, "itl_p99_ms": gaps, "forward_passes": 7}
    teardown.tells_sample = True
    benchmark.pedantic(work, setup=lambda: None, teardown=teardown, rounds=3)
    rounds = {"tokens_per_s": [1.0], "itl_p99_ms": [1.0], "forward_passes": [7]}
    what = dict(backend="b", model="m", workload="w", group="g", schema=1, fingerprint={"cpu": "any"})
    benchmark.extra_info.update(what, rounds=rounds)
    assert calls

def test_nothing_measured():
    pass
"""


def repo(folder, head_factor=1.0, tests=TESTS, head_tests=None):
    """A repository of two commits, `base` and `head`."""
    folder.mkdir()
    (folder / ".gitignore").write_text("__pycache__\n")
    for name, factor, text in (("base", 1.0, tests), ("head", head_factor, head_tests or tests)):
        (folder / "thing.py").write_text(f"FACTOR = {factor}\n")
        (folder / "test_thing.py").write_text(text)
        commit(folder, name)
    return folder


def outcomes(comparison):
    return {
        (v.benchmark.rpartition("::")[2], v.metric.name if v.metric else ""): v.outcome
        for v in comparison.verdicts
    }


def test_a_slower_head_is_found_by_every_kind_of_benchmark_and_marks_hold(tmp_path):
    where = repo(tmp_path / "repo", head_factor=1.3)
    said = []
    found = ab(
        "base", "head", ["test_thing.py"], budget=120, repo=where, advance=said.append
    )  # it ends before
    assert outcomes(found) == {
        ("test_plain", "round_s"): Outcome.FAIL,
        ("test_marked", "round_s"): Outcome.PASS,
        ("test_told", "tokens_per_s"): Outcome.FAIL,
        ("test_told", "itl_p99_ms"): Outcome.FAIL,
        ("test_told", "forward_passes"): Outcome.PASS,
    }
    effects = {v.benchmark.rpartition("::")[2]: v.effect for v in found.verdicts}
    assert effects["test_plain"] == pytest.approx(0.3, abs=0.1)
    assert (found.exit, found.design) == (Exit.REGRESSION, "rounds in turn")
    assert said[0] == "processes 1 of 3"
    assert git(where, "worktree", "list").count("\n") == 0


@pytest.mark.slow
def test_nothing_that_differs_is_a_pass_by_exact_numbers(tmp_path):
    where = repo(tmp_path / "repo")
    found = ab("base", "head", ["test_thing.py", "-k", "told"], budget=12, repo=where)
    assert set(outcomes(found).values()) == {Outcome.PASS}


GONE = TESTS.replace("def test_plain", "def test_renamed")
SKIPS = TESTS.replace("    benchmark(work)", "    pytest.skip('not today')")
TURNED = TESTS.replace("def test_plain", "def test_z").replace("def test_told", "def test_plain")
TURNED = TURNED.replace("def test_z", "def test_told")


@pytest.mark.parametrize("tests", [GONE, pytest.param(SKIPS, marks=pytest.mark.slow)])
def test_a_benchmark_that_head_does_not_measure_is_an_error_and_the_others_are_judged(tmp_path, tests):
    where = repo(tmp_path / "repo", head_tests=tests)
    found = ab("base", "head", ["test_thing.py", "-k", "not marked"], budget=12, repo=where)
    assert outcomes(found)["test_plain", ""] is Outcome.ERROR
    assert outcomes(found)["test_told", "tokens_per_s"] is Outcome.PASS
    assert found.exit is Exit.NOT_COMPARABLE
    if tests is GONE:
        assert any("new, so not judged: test_thing.py::test_renamed" in note for note in found.notes)


WRONG = TESTS.replace("assert calls", "assert False, 'wrong tokens'")
STOPS = TESTS.replace("def work():", "def work():\n    assert thing.FACTOR < 1, 'a round'")
DIES = TESTS.replace("def work():", "def work():\n    os._exit(3)")


@pytest.mark.parametrize(("tests", "says"), [
    (WRONG, "(?s)head, process 1: .*wrong tokens"), (STOPS, "(?s)head, process 1: .*a round"),
    (DIES, "head, process 1: pytest ended with code 3"),
    (TURNED, "cannot take turns: have both in one order"),
])  # fmt: skip
def test_what_goes_wrong_in_a_process_ends_it_with_pytests_own_words(tmp_path, tests, says):
    where = repo(tmp_path / "repo", head_tests=tests)
    with pytest.raises(GateError, match=says) as error:
        ab("base", "head", ["test_thing.py"], budget=4, repo=where)
    assert error.value.code is Exit.NOT_COMPARABLE


def test_a_head_without_any_benchmark_is_never_a_pass(tmp_path):
    where = repo(tmp_path / "repo", head_tests="def test_nothing(): pass")
    with pytest.raises(GateError, match="head: pytest measured nothing"):
        ab("base", "head", ["test_thing.py"], budget=4, repo=where)


@pytest.mark.parametrize(("options", "says"), [
    ({"budget": 0}, "budget=0"), ({"budget": float("nan")}, "budget=nan"), ({"pairs": 0}, "pairs=0"),
    ({"round_s": -1}, "min-round=-1"), ({"interleave": "steps"}, "interleave='steps'"),
])  # fmt: skip
def test_numbers_that_cannot_decide_anything_are_refused(options, says):
    with pytest.raises(GateError, match=says) as error:
        ab("a", "b", [], **options)
    assert error.value.code is Exit.USAGE


@pytest.fixture
def two(tmp_path):
    """A pair of live processes of the same tree."""
    where = repo(tmp_path / "repo")
    sides = []
    for name in ("base", "head"):
        folder = tmp_path / name
        folder.mkdir()
        command = pytest_command(["test_thing.py"], where, f"--benchmark-json={folder / turns.SAVED}", "-x")
        sides.append(turns.Side(name, command, where, environment(where), folder))
    with turns.pair(sides, random.Random(0)) as pair:
        yield pair


SKIPPED = """
import os, time
import pytest, thing

@pytest.mark.skip(reason="as on a machine without a GPU")
def test_gpu(benchmark):
    benchmark(int)

def test_threads(benchmark):
    def fresh():
        return os.sched_getaffinity(0)
    everywhere = fresh()
    seen = set()
    def teardown():
        seen.add(frozenset(fresh()))
        return {"tokens_per_s": 100 / thing.FACTOR}
    teardown.tells_sample = True
    benchmark.pedantic(lambda: time.sleep(0.001), teardown=teardown, rounds=1)
    rounds = {"tokens_per_s": [100 / thing.FACTOR]}
    what = dict(backend="b", model="m", workload="w", group="g", schema=1, fingerprint={"cpu": "any"})
    benchmark.extra_info.update(what, rounds=rounds)
    assert {len(cpus) for cpus in seen - {frozenset(everywhere)}} == {1}
    assert fresh() == everywhere
"""


def test_a_benchmark_that_both_skip_keeps_nothing_waiting_and_processors_are_given_back(tmp_path):
    where = repo(tmp_path / "repo", head_factor=1.5, tests=SKIPPED)
    said = []
    found = ab("base", "head", ["test_thing.py"], budget=20, repo=where, advance=said.append)
    assert outcomes(found) == {("test_threads", "tokens_per_s"): Outcome.FAIL}
    assert said == ["processes 1 of 3", "processes 2 of 3"]


def test_rounds_alternate_in_drawn_abba_order_on_one_processor_at_a_time(two):
    seen = []

    def measure(item, meeting):
        meeting.warm_up(0.001)
        seen.extend(meeting.group(0.01) for _ in range(12))

    two.run({"test_thing.py::test_told"}, measure)
    base, head = two.conclude()
    assert {group.order for group in seen} == {(0, 1, 1, 0), (1, 0, 0, 1)}
    assert Counter(side for group in seen for side in group.order) == {0: 24, 1: 24}
    for group in seen:
        assert all(turn.seconds >= 0.01 and turn.canary_s[0] > 0 for turn in group.turns)
        assert {sample["tokens_per_s"] for sample in (*group.of(0), *group.of(1))} == {100.0}
    assert [list(run.benchmarks) for run in (base, head)] == [["test_thing.py::test_told"]] * 2


def test_processes_that_are_left_alone_end(two):
    two.run(set(), lambda item, meeting: None)
    assert two.conclude() == [None, None]


def test_a_process_that_is_killed_is_said_to_be(two):
    def kill(item, meeting):
        os.kill(two.processes[1].process.pid, signal.SIGKILL)
        meeting.group(0.01)

    with pytest.raises(GateError, match="head: pytest ended with code -9"):
        two.run(two.common, kill)


def test_each_side_sees_its_share_of_a_gpu_and_no_more(monkeypatch):
    """A torch that is none: 100 bytes a device, of which the other side has taken some."""
    asked = []
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, mem_get_info=lambda device=None: (30, 100),
        memory_reserved=lambda device=None: 15,
        set_per_process_memory_fraction=lambda share, device: asked.append((share, device)),
    )  # fmt: skip
    cuda.memory = SimpleNamespace(mem_get_info=cuda.mem_get_info)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    turn_agent._share_gpu()
    turn_agent._share_gpu()
    assert asked == [(0.45, 0), (0.45, 1)]
    assert cuda.mem_get_info() == cuda.memory.mem_get_info(0) == (30, 45)


def test_what_was_timed_before_is_told_again_as_often_and_no_oftener(tmp_path):
    tests = """
def test_peers(benchmark):
    rounds = iter([0.5, 0.6])
    def again():
        next(rounds)
    again.replayed = True
    benchmark.pedantic(again, rounds=2)
"""
    where = repo(tmp_path / "repo", tests=tests)
    found = ab("base", "head", ["test_thing.py"], budget=3, pairs=1, repo=where)
    assert (found.verdicts, found.outcome) == ((), Outcome.ERROR)  # nothing compared is no pass
    assert any("not judged: test_thing.py::test_peers: they time themselves" in note for note in found.notes)


MODULE = """
import pytest

@pytest.fixture(scope="module")
def shared():
    yield []

class TestOne:
    def test_fast(self, benchmark, shared):
        benchmark(sum, range({size}))

    def test_dict(self, benchmark, shared):
        benchmark.pedantic(sum, args=(range(1000),), teardown=lambda _: {{"round_s": "mine"}}, rounds=1)

def test_asks_late(request):
    request.getfixturevalue("benchmark")(sum, range(100))
"""


@pytest.mark.slow
def test_modules_classes_and_strange_tests_run_side_by_side(tmp_path):
    """What is decided is left out of later processes, whatever module or class comes after it."""
    where = tmp_path / "repo"
    where.mkdir()
    (where / ".gitignore").write_text("__pycache__\n")
    for name, size in (("base", 5000), ("head", 9000)):
        for module, length in (("a", 5000), ("b", size), ("c", 5000)):
            (where / f"test_{module}.py").write_text(MODULE.format(size=length))
        commit(where, name)
    found = ab("base", "head", ["."], budget=25, repo=where)
    got = {(v.benchmark, v.metric.name if v.metric else ""): v.outcome for v in found.verdicts}
    assert got["test_b.py::TestOne::test_fast", "round_s"] is Outcome.FAIL
    assert got["test_a.py::test_asks_late", "round_s"] is Outcome.ERROR
    assert all(f"test_{m}.py::TestOne::test_dict" in {name for name, _ in got} for m in "abc")


def test_a_child_that_lives_on_keeps_nobody_waiting(tmp_path):
    tests = """
import os, time
def test_forks(benchmark):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os._exit(3)
"""
    where = repo(tmp_path / "repo", tests=tests)
    began = time.monotonic()
    with pytest.raises(GateError, match="pytest ended with code 3"):
        ab("base", "head", ["test_thing.py"], budget=5, repo=where)
    assert time.monotonic() - began < 30
