"""Saved runs: found by file, number or name; whatever is wrong with one is said, and never taken for a
pass."""

from __future__ import annotations

import json
import math
import random

import pytest

from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.tolerances import Tolerance, check_tolerance
from tests.perf import fake_runs


def entry(**extra):
    return fake_runs.entry(
        "32", "batch_size", random.Random(0), batch_size=32, **fake_runs.speeds(60_000, 32), **extra
    )


@pytest.fixture
def save(tmp_path):
    """`save(name, entries, number)` saves a run in a machine's folder of the storage."""
    folder = tmp_path / ".benchmarks" / "Linux-CPython-3.12-64bit"
    folder.mkdir(parents=True)
    return lambda name, entries=None, number=1: fake_runs.save(
        folder, name, [entry()] if entries is None else entries, number
    )


def test_a_run_is_found_by_file_by_number_and_by_name(save, tmp_path):
    storage, path = tmp_path / ".benchmarks", save("main")
    for which in (path, str(path), "1", "0001", "main"):
        run = saved_runs.load(which, storage)
        assert (run.path, run.name) == (path, "main")
    benchmark = run.benchmarks["perf/benchmarks/test_batch_size.py::test_batch_size[32]"]
    assert benchmark.group == "batch_size"
    assert benchmark.info["tokens_per_s"] == 60_000
    assert "rounds" not in benchmark.info
    assert "fingerprint" not in benchmark.info
    assert len(benchmark.rounds["tokens_per_s"]) == 5
    assert benchmark.fingerprint["gpu"] == "NVIDIA H200"
    assert not benchmark.problems


def test_of_a_name_saved_at_several_commits_the_last_is_meant(save, tmp_path):
    for number in (9, 10, 2):
        save("main", number=number)
    run = saved_runs.load("main", tmp_path / ".benchmarks")
    assert (run.path.name, run.sessions) == ("0010_main.json", 1)


def test_a_name_in_two_machines_folders_is_refused(save, tmp_path):
    other = tmp_path / ".benchmarks" / "Linux-CPython-3.11-64bit"
    other.mkdir()
    save("main")
    fake_runs.save(other, "main", [entry()])
    with pytest.raises(GateError, match=r"is in .*3\.11.* and in .*3\.12.*: give the path"):
        saved_runs.load("main", tmp_path / ".benchmarks")


def test_a_missing_baseline_says_what_there_is_and_how_to_make_one(save, tmp_path):
    save("main")
    with pytest.raises(GateError, match=r"no run 'mian'.*saved there: main.*--benchmark-save=mian") as error:
        saved_runs.load("mian", tmp_path / ".benchmarks")
    assert error.value.code is Exit.NOT_COMPARABLE
    with pytest.raises(GateError, match="there is no storage"):
        saved_runs.load("main", tmp_path / "nowhere")
    with pytest.raises(GateError, match="is not there"):
        saved_runs.load(tmp_path / "gone.json")
    with pytest.raises(GateError, match="is a folder"):
        saved_runs.load(tmp_path)


@pytest.mark.parametrize(("text", "says"), [
    ("", "cannot be read as JSON"), ('{"benchmarks": [', "cannot be read as JSON"),
    ("\xff", "cannot be read as JSON"), ("[]", "not a pytest-benchmark run"),
    ("{}", "not a pytest-benchmark run"), ('{"benchmarks": {}}', "not a pytest-benchmark run"),
    ('{"benchmarks": [3]}', "without a fullname"),
    ('{"benchmarks": []}', "is empty: every benchmark was skipped, deselected or ended with an error"),
])  # fmt: skip
def test_a_broken_or_empty_run_is_an_error(tmp_path, text, says):
    path = tmp_path / "0001_main.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(GateError, match=says) as error:
        saved_runs.load(path)
    assert error.value.code is Exit.NOT_COMPARABLE


def test_a_benchmark_twice_is_refused():
    with pytest.raises(GateError, match="twice"):
        saved_runs.parse({"benchmarks": [entry(), entry()]}, "main.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, None, "3", True])
def test_a_round_that_is_no_number_is_a_problem_of_its_metric(save, value):
    bad = entry()
    bad["extra_info"]["rounds"]["tokens_per_s"][2] = value
    (found,) = saved_runs.load(save("main", [bad])).benchmarks.values()
    assert "not a finite number" in found.problems["tokens_per_s"]
    assert "tokens_per_s" not in found.rounds
    assert "ttft_p50_ms" in found.rounds


def test_rounds_of_what_is_not_gated_or_not_there_are_problems():
    bad = entry()
    bad["extra_info"]["rounds"] |= {"charm": [1.0], "goodput": []}
    (found,) = saved_runs.parse({"benchmarks": [bad]}, "x.json").benchmarks.values()
    assert "not a gated metric" in found.problems["charm"]
    assert found.problems["goodput"] == "has no values"


@pytest.mark.parametrize(("change", "says"), [
    ({"schema": 2}, "schema 2, not 1"), ({"fingerprint": {}}, "no per-round data"),
    ({"rounds": {}}, "no per-round")
])  # fmt: skip
def test_a_record_that_lacks_what_it_needs_is_a_problem(change, says):
    bad = entry()
    bad["extra_info"] |= change
    (found,) = saved_runs.parse({"benchmarks": [bad]}, "x.json").benchmarks.values()
    assert says in found.problems[""]


def test_a_plain_benchmark_is_judged_by_its_time_if_that_was_saved():
    plain = {
        "fullname": "test_x.py::test_x",
        "group": None,
        "extra_info": {},
        "stats": {"data": [0.1, 0.2, 0.1]},
    }
    (found,) = saved_runs.parse(
        {"benchmarks": [plain], "machine_info": {"system": "Linux"}}, "x.json"
    ).benchmarks.values()
    assert found.rounds == {"round_s": (0.1, 0.2, 0.1)}
    assert found.fingerprint["system"] == "Linux"
    plain["stats"] = {"mean": 0.1}
    (found,) = saved_runs.parse({"benchmarks": [plain]}, "x.json").benchmarks.values()
    assert "--benchmark-save-data" in found.problems[""]
    assert not found.rounds


def test_a_tests_own_tolerances_are_read():
    own = entry(gate=json.dumps({"ttft_p95_ms": {"rel": 0.2, "abs": 2.0}, "goodput": {"rel": 0.5}}))
    (found,) = saved_runs.parse({"benchmarks": [own]}, "x.json").benchmarks.values()
    assert found.tolerances == {"ttft_p95_ms": Tolerance(0.2, 2.0), "goodput": Tolerance(0.5, None)}
    assert "gate" not in found.info


@pytest.mark.parametrize(("args", "says"), [
    (("charm", 0.1), "no such gated metric"), (("forward_passes", 0.1), "compared exactly"),
    (("tokens_per_s",), "give rel=, abs= or both"), (("tokens_per_s", -0.1), "must be a number of 0 or more"),
    (("tokens_per_s", math.nan), "must be a number"), (("tokens_per_s", None, True), "must be a number"),
    (("tokens_per_s", 10), "below 1"),
])  # fmt: skip
def test_a_tolerance_that_makes_no_sense_is_a_usage_error(args, says):
    with pytest.raises(GateError, match=says) as error:
        check_tolerance(*args)
    assert error.value.code is Exit.USAGE


@pytest.mark.parametrize("gate", ["{", "[]", '{"tokens_per_s": 3}', '{"tokens_per_s": {"relative": 3}}', 3])
def test_tolerances_that_cannot_be_read_are_a_usage_error(gate):
    with pytest.raises(GateError, match=r"gate=.* is not a JSON object of tolerances"):
        saved_runs.parse({"benchmarks": [entry(gate=gate)]}, "x.json")
