"""The plugin from outside: pytest runs in a folder of their own, their exit codes, and what they save."""

from __future__ import annotations

import json
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.gate import saving
from perf.measure import machine_speed
from perf.measure.machine_speed import MachineSpeed

pytest_plugins = ["pytester"]

TIMED = """
import pytest
def test_time(benchmark):
    benchmark.pedantic(lambda: None, rounds=6)
"""
MADE_UP = """
import pytest
from perf.backends import timeline
class Backend:
    name, exact = "made-up", False
    def missing(self, device): return None
    def open(self, setup): return self
    def close(self): pass
    def run(self, items):
        tokens = [[1] * item.params.max_new_tokens for item in items]
        seconds = [[{second} * (1 + at) for at in range(len(row))] for row in tokens]
        return timeline(items, tokens, seconds, keeps_times={times})
{mark}
def test_it(perf_case, device):
    perf_case.measure("load", Backend(), "mixed-2", device=device, max_batch_size=2)
    {after}
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # the latter collects garbage five times a run
    without = ("-p", "no:cacheprovider", "-p", "no:unraisableexception")
    own = ("-p", "perf.plugin", "--min-time=0", *without)
    return pytester.runpytest_inprocess(*own, *arguments, no_reraise_ctrlc=True)


@pytest.fixture(autouse=True, scope="module")
def _imported(imported_for_measuring: None) -> None:
    """Import the rest of what runs inside will need, too."""
    for name in ("perf.report.session_tables", "perf.gate.verdict", "perf.gate.session_gate", "perf.report"):
        import_module(name)
    import_module("rich.table")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rates of the machine to wait for, and no search for the processor's name at every save."""
    monkeypatch.setattr(machine_speed, "measure", lambda *args, **how: MachineSpeed(100.0, 10.0))
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)


def ended(pytester: pytest.Pytester, *arguments: str) -> tuple[int, str]:
    """The exit code and the output of a session, which may end before it begins."""
    result = run(pytester, *arguments)
    return int(result.ret), result.stdout.str() + result.stderr.str()


def saved(pytester: pytest.Pytester) -> list[dict[str, Any]]:
    files = sorted(Path(pytester.path).rglob(".benchmarks/*/*.json"))
    return json.loads(files[-1].read_text())["benchmarks"] if files else []


def made_up(
    pytester: pytest.Pytester, second: float = 0.1, mark: str = "", after: str = "", times: bool = True
) -> None:
    pytester.makepyfile(test_made_up=MADE_UP.format(second=second, mark=mark, after=after, times=times))


# Which points run


def test_points_are_pairs_of_device_and_value_and_quick_skips_by_name(pytester: pytest.Pytester):
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.points("size", cpu=[1], cuda=[4, (5, 6)], quick=[4])
        def test_it(perf_case, device, size): pass
        @pytest.mark.points("batch_size", cpu=[1], cuda=[2])
        def test_sweep(perf_case, device, batch_size): pass
        @pytest.mark.points("peer", cpu=["a"], cuda=["b"])
        def test_peer(perf_case, device, peer): pass
        def test_plain(perf_case, device): pass
        def test_other(): pass
        """
    )
    result = run(
        pytester, "--collect-only", "-q", "--batch-sizes", "3,9", "--peers", "x, y", "--backend", "m:o"
    )
    found = [line.split("::")[1] for line in result.outlines if "::" in line]
    assert found == [
        "test_it[cpu-1]", "test_it[cuda-4]", "test_it[cuda-5x6]",
        "test_sweep[cpu-3]", "test_sweep[cpu-9]", "test_sweep[cuda-3]", "test_sweep[cuda-9]",
        "test_peer[cpu-x]", "test_peer[cpu-y]", "test_peer[cpu-m:o]",
        "test_peer[cuda-x]", "test_peer[cuda-y]", "test_peer[cuda-m:o]",
        "test_plain[cpu]", "test_plain[cuda]", "test_other",
    ]  # fmt: skip
    quick = run(pytester, "-rs", "--quick", "-k", "test_it and cuda")
    quick.assert_outcomes(skipped=2)
    assert any("left out by --quick" in line for line in quick.outlines)


def test_peers_run_at_each_batch_size_that_is_given(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    found: list[tuple[list[str], int]] = []
    monkeypatch.setattr(
        "perf.measure.interleave.run_peers",
        lambda bench, names, workload, device, size, rounds: found.append((names, size)) or {},
    )
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.points("peer", cpu=["a", "b"], cuda=[])
        def test_it(perf_case, peer_rounds, device, peer, peers_at_once):
            peer_rounds(device, "mixed-2", peers_at_once or 7, 1)
        """
    )
    run(pytester).assert_outcomes(passed=2)
    run(pytester, "--batch-sizes", "1,4").assert_outcomes(passed=4)
    assert found == [(["a", "b"], 7), (["a", "b"], 1), (["a", "b"], 4)]


def test_a_peer_that_is_left_out_is_not_run_for_the_others(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    found: list[list[str]] = []
    monkeypatch.setattr(
        "perf.measure.interleave.run_peers", lambda bench, names, *how: found.append(names) or {}
    )
    pytester.makepyfile(
        """
        import pytest
        left_out = pytest.param("cpu", "b", marks=pytest.mark.skip)
        @pytest.mark.parametrize(("device", "peer"), [("cpu", "a"), left_out, ("cpu", "c")])
        def test_it(peer_rounds, device, peer): peer_rounds(device, "mixed-2", 2, 1)
        """
    )
    run(pytester).assert_outcomes(passed=2, skipped=1)
    assert found == [["a", "c"]]


def test_sizes_must_be_numbers(pytester: pytest.Pytester):
    assert run(pytester, "--batch-sizes", "0").ret == pytest.ExitCode.USAGE_ERROR


def test_gpu_tests_skip_with_the_reason_or_fail_with_one(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): raise AssertionError")
    result = run(pytester, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs a CUDA device; torch finds none"])
    result = run(pytester, "-m", "gpu", "--require-gpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: --require-gpu: torch finds no CUDA device here, so no gpu test can run"]
    )


# What is saved


def test_a_run_is_saved_with_all_that_was_measured(pytester: pytest.Pytester):
    marks = '@pytest.mark.perf_gate("tpot_p50_ms", rel=0.2)\n@pytest.mark.perf_gate("tpot_p50_ms", abs=1.0)'
    made_up(pytester, mark=marks)
    run(pytester, "-m", "not gpu", "--benchmark-save=base", "--rounds=2").assert_outcomes(
        passed=1, deselected=1
    )
    (entry,) = saved(pytester)
    ((key, info),) = entry["extra_info"].items()
    assert key == "dynamic_batch"
    assert entry["group"] == info["group"] == "load"
    assert len(info["rounds"]["tokens_per_s"]) == entry["stats"]["rounds"] == 2
    assert json.loads(info["gate"]) == {"tpot_p50_ms": {"rel": 0.2, "abs": 1.0}}
    assert info["same_tokens"] < info["checked_requests"]


def test_what_to_slow_down_and_how_long_to_measure_reach_the_session(pytester: pytest.Pytester):
    made_up(
        pytester, after="assert (perf_case.bench.inject_slowdown, perf_case.bench.min_time) == ('9@2', 3.5)"
    )
    options = ("--perf-inject-slowdown=9@2", "--min-time=3.5", "--rounds=1")
    run(pytester, "-m", "not gpu", *options).assert_outcomes(passed=1, deselected=1)


@pytest.mark.parametrize("after", ["assert False", "perf_case.record(dict(group='g', x=1)); raise KeyError"])
def test_what_fails_after_its_timing_is_not_saved(pytester: pytest.Pytester, after: str):
    made_up(pytester, after=after)
    assert run(pytester, "-m", "not gpu", "--benchmark-save=base").ret == pytest.ExitCode.TESTS_FAILED
    assert saved(pytester) == []


def test_a_plain_benchmark_that_fails_after_its_timing_is_not_saved_either(pytester: pytest.Pytester):
    pytester.makepyfile(TIMED + "    assert False\ndef test_good(benchmark):\n    benchmark(lambda: None)\n")
    run(pytester, "--benchmark-save=base")
    assert [entry["name"] for entry in saved(pytester)] == ["test_good"]


def test_not_a_number_fails_and_is_not_saved(pytester: pytest.Pytester):
    made_up(pytester)
    file = pytester.path / "test_made_up.py"
    file.write_text(
        file.read_text().replace("max_batch_size=2", "max_batch_size=2, extra={'x': float('nan')}")
    )
    result = run(pytester, "-m", "not gpu", "--benchmark-save=base")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*ValueError: x is nan: it was not measured*"])
    assert saved(pytester) == []


def test_without_saving_benchmarks_may_be_off(pytester: pytest.Pytester):
    made_up(pytester)
    run(pytester, "-m", "not gpu", "--benchmark-disable").assert_outcomes(passed=1, deselected=1)


@pytest.mark.parametrize(
    ("given", "off"),
    [({"numprocesses": 2}, saving.XDIST), ({"dist": "load"}, saving.XDIST), ({}, None),
     ({"benchmark_disable": True}, saving.DISABLE), ({"benchmark_skip": True}, saving.SKIP),
     ({"benchmark_disable": True, "benchmark_enable": True}, None),
     ({"benchmark_skip": True, "benchmark_only": True}, None)],
)  # fmt: skip
def test_whatever_turns_benchmarks_off_is_named(given: dict[str, Any], off: str | None):
    options = {
        "dist": "no",
        "benchmark_disable": False,
        "benchmark_enable": False,
        "benchmark_skip": False,
        **given,
    }
    config: Any = types.SimpleNamespace(getoption=lambda name, default=None: options.get(name, default))
    assert saving.benchmarks_off(config) == off


# The gate at the end


def gated(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return run(pytester, "-m", "not gpu", "--perf-baseline=base", *arguments)


def test_the_same_speed_passes_and_a_slower_one_fails(pytester: pytest.Pytester):
    made_up(pytester)
    for _ in range(2):
        run(pytester, "-m", "not gpu", "--benchmark-save=base")
    result = gated(pytester)
    assert result.ret == 0, result.stdout.str()
    result.stdout.fnmatch_lines(["*PASS*"])
    made_up(pytester, second=0.12, times=False)
    result = gated(pytester)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*FAIL*"])


def test_one_session_against_one_is_judged_where_the_storage_tells_the_noise(pytester: pytest.Pytester):
    """Which is read before this session saves itself: it must not count as its own past."""
    made_up(pytester)
    run(pytester, "-m", "not gpu", "--benchmark-save=base")
    result = gated(pytester, "--benchmark-save=night")
    assert result.ret == 4, result.stdout.str()
    assert "noise is unknown" in " ".join(result.stdout.str().split())  # however the table is wrapped
    assert gated(pytester, "--benchmark-save=night").ret == 4
    assert gated(pytester).ret == 0  # by the two of last night


def test_a_baseline_that_is_not_there_is_an_error_before_anything_runs(pytester: pytest.Pytester):
    pytester.makepyfile("def test_it(): raise AssertionError")
    code, text = ended(pytester, "--perf-baseline=base")
    assert code == 3
    assert "no run 'base'" in text
    assert "AssertionError" not in text


@pytest.mark.parametrize("off", ["--benchmark-disable", "--benchmark-skip"])
def test_a_gate_without_timings_is_an_error(pytester: pytest.Pytester, off: str):
    pytester.makepyfile(TIMED)
    code, text = ended(pytester, "--perf-baseline=base", off)
    assert code == 2
    assert f"run without {off}" in text


def test_a_benchmark_that_is_gone_or_skipped_is_an_error_and_one_not_asked_for_is_not(
    pytester: pytest.Pytester,
):
    other = TIMED.replace("test_time", "test_other")
    pytester.makepyfile(test_a=TIMED, test_b=other)
    run(pytester, "--benchmark-save=base", "--benchmark-save-data")
    assert "not judged: test_b.py::test_other" in gated(pytester, "test_a.py").stdout.str()
    assert "not judged: test_b.py::test_other" in gated(pytester, "test_a.py::test_time").stdout.str()
    assert "deselected here" not in gated(pytester).stdout.str()
    assert "deselected here and not judged" in gated(pytester, "-k", "test_time").stdout.str()
    pytester.makepyfile(test_b="import pytest\n" + other.replace("def ", "@pytest.mark.skip\ndef "))
    assert gated(pytester).ret == 3
    pytester.makepyfile(test_a="def test_nothing(): pass", test_b="def test_none(): pass")
    result = gated(pytester)
    assert result.ret == 3
    assert "is empty" in result.stdout.str()


def test_a_failing_test_keeps_pytest_s_own_exit_code(pytester: pytest.Pytester):
    pytester.makepyfile(TIMED)
    run(pytester, "--benchmark-save=base", "--benchmark-save-data")
    pytester.makepyfile("def test_bad(): raise AssertionError")
    assert gated(pytester).ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("mark", "said"),
    [("'nothing', rel=0.1", "no such gated metric"), ("'forward_passes', rel=0.1", "compared exactly"),
     ("'ttft_p95_ms', relative=1", "rel= or abs=")],
)  # fmt: skip
def test_a_tolerance_the_gate_could_not_use_is_an_error_at_once(
    pytester: pytest.Pytester, mark: str, said: str
):
    pytester.makepyfile(f"import pytest\n@pytest.mark.perf_gate({mark})\ndef test_it(): pass")
    code, text = ended(pytester)
    assert code == 2
    assert said in text


# What is printed


def test_tables_show_ours_beside_the_demonstration_s():
    from perf.report.session_tables import tables
    from perf.report.terminal import drawn

    base = {
        "device": "cuda",
        "dtype": "float16",
        "workload": "mixed-32",
        "batch_size": 16,
        "latency_mean_ms": 300.0,
    }
    rows: list[dict[str, Any]] = [
        {**base, "group": "policy", "policy": policy, "tokens_per_s": rate, "model": "random:qwen2.5-0.5b"}
        for policy, rate in (("sequential", 100.0), ("continuous", 900.0))
    ]
    rows.append(
        {**base, "group": "scale", "model": "random:llama-7b", "speedup": 12.5, "tokens_per_s": 800.0}
    )
    (policies, table), (_, scale) = tables(rows)
    assert policies == "policies: mixed-32 on random:qwen2.5-0.5b, float16, cuda"
    lines = [line.split() for line in drawn(table, 160) if line.strip(" ─")]
    assert [line[0] for line in lines] == [
        "policy",
        "sequential",
        "continuous",
        *["demonstration"] * 2,
        "demonstration:",
    ]
    assert lines[2][1:5] == ["16", "900.0", "9.00", "0.30"]
    assert lines[4][3:6] == ["501.0", "7.37", "0.45"]
    assert any(line.split()[3:5] == ["12.50", "6.17"] for line in drawn(scale, 160))
    assert all(len(line) <= 100 for line in drawn(table, 100))
    assert list(tables([{**base, "group": "decode"}])) == []
