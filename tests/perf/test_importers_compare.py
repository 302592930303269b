"""Imported runs saved, compared and shown: as any other run, and never those of two tools with each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perf import cli
from perf.gate.saved_runs import load
from perf.gate.tolerances import Tolerance
from perf.importers import Tool
from tests.perf.imported import RUNS, copied, slowed

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*args)` gives the exit code, what was printed, and the errors; we stand in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, str, str]:
        try:
            cli.main([str(arg) for arg in args])
            code = 0
        except SystemExit as end:
            code = int(str(end.code or 0))
        return code, *capsys.readouterr()

    return call


def sessions(run: Run, tool: Tool, name: str, folder: Path, factor: float, seed: int) -> None:
    """Import three sessions of three rounds, as fast as a fixture but for the factor, and half a percent of
    noise."""
    rng = np.random.default_rng(seed)
    for _ in range(3):
        files = [
            slowed(tool, RUNS[tool][0], folder / "files", factor * np.exp(rng.normal(0, 0.005)))
            for _ in range(3)
        ]
        assert run("import", tool, *files, "--save", name)[0] == 0


@pytest.mark.parametrize("tool", list(Tool))
def test_two_runs_of_a_tool_compare_and_one_that_is_slower_fails(tool, run, tmp_path):
    sessions(run, tool, "main", tmp_path, 1.0, 1)
    sessions(run, tool, "again", tmp_path, 1.0, 2)
    sessions(run, tool, "slow", tmp_path, 1.5, 3)
    code, out, _ = run("compare", "main", "again")
    assert code in (0, 4)
    assert "FAIL" not in out
    code, out, _ = run("compare", "main", "slow", "--json", "found.json")
    assert code == 1
    found = {one["metric"]: one for one in json.loads(Path("found.json").read_text())["verdicts"]}
    assert {one["outcome"] for one in found.values()} == {"FAIL"}
    assert found["ttft_p50_ms"]["effect"] == pytest.approx(0.5, abs=0.02)
    assert found["tokens_per_s"]["effect"] == pytest.approx(-1 / 3, abs=0.02)


def test_a_single_session_tells_nothing_of_times(run, tmp_path):
    """Rounds of one process of a server share its luck, however many there are."""
    for name in ("main", "slow"):
        factor = 1.5 if name == "slow" else 1.0
        files = [slowed(Tool.AIPERF, RUNS[Tool.AIPERF][at], tmp_path / "files", factor) for at in (0, 1)]
        assert run("import", "aiperf", *files, "--save", name)[0] == 0
    code, out, _ = run("compare", "main", "slow")
    assert code == 4
    assert "one session a side" in out


@pytest.mark.parametrize("other", [tool for tool in Tool if tool is not Tool.AIPERF])
def test_runs_of_different_tools_are_not_compared(other, run, tmp_path):
    for tool in (Tool.AIPERF, other):
        run("import", tool, copied(tool, RUNS[tool][0], tmp_path / "files"), "--save", tool)
    code, out, _ = run("compare", "aiperf", other)
    assert code == 3
    assert "refused, the fingerprint is another: " in out
    assert f"tool aiperf -> {other}" in out


def test_runs_of_different_versions_of_a_tool_are_not_compared(run, tmp_path):
    for version in ("0.13.0", "0.13.1"):
        path = copied(
            Tool.AIPERF,
            RUNS[Tool.AIPERF][0],
            tmp_path / "files",
            lambda data, version=version: data.update(aiperf_version=version),
        )
        run("import", "aiperf", path, "--save", version)
    code, out, _ = run("compare", "0.13.0", "0.13.1")
    assert code == 3
    assert "tool_version 0.13.0 -> 0.13.1" in out


def test_a_run_is_saved_as_pytest_benchmark_does_with_what_was_noted(run, tmp_path):
    files = [copied(Tool.VLLM_BENCH, name, tmp_path / "files") for name in RUNS[Tool.VLLM_BENCH]]
    code, out, err = run("import", "vllm-bench", *files, "--save", "main")
    (path,) = Path(".benchmarks").glob("*/0001_main.json")
    assert (code, out.replace("\n", "")) == (
        0,
        f"saved as 'main' in {path}: imported::load[concurrency:4] (2 rounds)",
    )
    assert "note: TTFT ends with the first chunk that has choices, be there text in it or not\n" in err
    found = load("main")
    (benchmark,) = found.benchmarks.values()
    assert not benchmark.problems
    assert benchmark.fingerprint == {"tool": "vllm-bench", "tool_version": None, "records": "of each request"}
    durations = [json.loads(file.read_text())["duration"] for file in files]
    speeds = [json.loads(file.read_text())["output_throughput"] for file in files]
    assert benchmark.rounds["tokens_per_s"] == pytest.approx(speeds)
    assert len(benchmark.rounds["itl_p99_ms"]) == 1  # of both rounds together, for a thousand gaps are needed
    assert benchmark.info["itl_p99_n"] == 2 * (128 - 8)
    assert benchmark.info["tokens_per_s"] == min(speeds)
    assert str(benchmark.info["definitions"]).startswith("times count from when a request was sent")
    saved = json.loads(path.read_text())["benchmarks"][0]
    assert saved["stats"]["data"] == durations
    assert saved["stats"]["mean"] == pytest.approx(np.mean(durations))
    assert run("import", "vllm-bench", files[0], "--save", "next")[0] == 0
    assert list(Path(".benchmarks").glob("*/0002_next.json"))


def test_a_project_s_tolerances_hold_as_far_as_their_metrics_are_recorded(run, tmp_path):
    limits = "ttft_p95_ms = { rel = 0.5, abs = 2.0 }\nround_s = { rel = 0.1 }\n"
    Path("pyproject.toml").write_text(f"[tool.dynamic-batch.perf.tolerances]\n{limits}")
    run("import", "aiperf", copied(Tool.AIPERF, RUNS[Tool.AIPERF][0], tmp_path / "files"), "--save", "main")
    (benchmark,) = load("main").benchmarks.values()
    assert benchmark.tolerances == {"ttft_p95_ms": Tolerance(rel=0.5, abs=2.0)}


def test_a_sweep_is_a_benchmark_a_rate(run, tmp_path):
    path = copied(Tool.GUIDELLM, "rates.json", tmp_path / "files")
    assert run("import", "guidellm", path, "--save", "main")[0] == 0
    assert list(load("main").benchmarks) == ["imported::load[poisson:4]", "imported::load[poisson:8]"]
    code, out, _ = run(
        "report", "main", "--html", "page.html", "--markdown", "summary.md", "--csv", "runs.csv"
    )
    assert code == 0
    assert "load[poisson:8]" in out
    assert all(Path(name).stat().st_size for name in ("page.html", "summary.md", "runs.csv"))


def test_lines_of_one_file_are_rounds_and_a_storage_may_be_named(run, tmp_path):
    path = copied(Tool.SGLANG, "summaries.jsonl", tmp_path / "files")
    storage = tmp_path / "elsewhere"
    assert run("import", "sglang", path, "--save", "main", "--storage", f"file://{storage}")[0] == 0
    (benchmark,) = load("main", storage).benchmarks.values()
    assert len(benchmark.rounds["ttft_p95_ms"]) == 2


def test_pytest_benchmark_opens_an_imported_run(run, tmp_path):
    path = copied(Tool.GENAI, RUNS[Tool.GENAI][0], tmp_path / "files")
    run("import", "genai", path, "--save", "main")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "0001"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "load[concurrency:4]" in done.stdout


def test_an_import_never_waits_for_torch(tmp_path):
    path = copied(Tool.VLLM_BENCH, RUNS[Tool.VLLM_BENCH][0], tmp_path / "files")
    code = "import sys; from perf.cli import main\n"
    code += f"try:\n    main(['import', 'vllm-bench', {str(path)!r}, '--save', 'main'])\n"
    code += "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules\n"
    env = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env, capture_output=True)
    assert list(tmp_path.glob(".benchmarks/*/0001_main.json"))
