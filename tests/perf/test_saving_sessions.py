"""`python -m perf save`: whole sessions in fresh processes, and nothing left of one that was not whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf import cli
from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.saving_sessions import save_sessions
from perf.gate.verdict import compare

ROOT = Path(__file__).parents[2]
TIMED = """
def test_time(benchmark):
    benchmark.pedantic(sum, args=([1],), rounds=6)
"""
COUNTED = """
import os, pathlib, signal, time
def test_process(benchmark):
    benchmark(int)
    with open("processes", "a") as file:
        print(os.getpid(), file=file)
    if len(pathlib.Path("processes").read_text().split()) == 2:
        {then}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_plugins: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "test_timed.py").write_text(TIMED)
    return tmp_path


def saved() -> list[str]:
    return sorted(path.name for path in Path(".benchmarks").rglob("*.json"))


def test_sessions_are_fresh_processes_saved_under_one_name_with_their_rounds(folder: Path, capsys):
    (folder / "test_counted.py").write_text(COUNTED.format(then="pass"))
    with pytest.raises(SystemExit) as end:
        cli.main(["save", "main", "--sessions", "2", "--", "."])
    assert (end.value.code, *capsys.readouterr()) == (
        0,
        "saved as 'main': 2 of 2 sessions\n",
        "session 1 of 2: main\nsession 2 of 2: main\n",
    )
    assert saved() == ["0001_main.json", "0002_main.json"]
    processes = {int(text) for text in Path("processes").read_text().split()}
    assert len(processes - {os.getpid()}) == 2
    run = saved_runs.load("main")
    assert run.sessions == 2
    timed = run.benchmarks["test_timed.py::test_time"]
    assert [len(rounds) for rounds in timed.rounds_by_session("round_s")] == [6, 6]
    judged = compare(run, run).verdicts
    assert all(verdict.low is not None for verdict in judged)  # two sessions a side are judged


def test_a_session_that_fails_ends_it_and_leaves_nothing_of_itself(folder: Path, capsys):
    """pytest-benchmark saves the benchmarks that did not fail: a part that no comparison could use."""
    (folder / "test_counted.py").write_text(COUNTED.format(then="assert 0, 'the second'"))
    with pytest.raises(SystemExit) as end:
        cli.main(["save", "main", "--sessions", "3", "--", "."])
    errors = capsys.readouterr().err
    assert end.value.code == 3
    assert "error: session 2 of 3: pytest ended with code 1" in errors
    assert "AssertionError: the second" in errors
    assert errors.endswith(
        "saved as 'main': 1 of 3 sessions; "
        "0002_main.json, which this one saved, was not whole and is deleted\n"
    )
    assert "session 3 of 3" not in errors
    assert saved() == ["0001_main.json"]


def test_a_session_that_measures_nothing_is_an_error(folder: Path):
    (folder / "test_timed.py").write_text("def test_nothing(): pass")
    with pytest.raises(GateError, match="session 1 of 2: pytest measured nothing") as error:
        [*save_sessions("main", 2, ["."])]
    assert error.value.code is Exit.NOT_COMPARABLE
    assert "saved as 'main': 0 of 2 sessions" in str(error.value)
    assert saved() == []


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_what_is_interrupted_saves_nothing_more_and_says_what_there_is(folder: Path, sent: str):
    then = f"os.kill(os.getppid(), signal.{sent}); time.sleep(60)"
    (folder / "test_counted.py").write_text(COUNTED.format(then=then))
    command = [sys.executable, "-m", "perf", "save", "main", "--sessions", "3", "--", "."]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted; saved as 'main': 1 of 3 sessions\n")
    assert saved() == ["0001_main.json"]
    last = int(Path("processes").read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.parametrize("option", [
    "--benchmark-save=other", "--benchmark-autosave", "--benchmark-json=x.json", "--perf-baseline=main",
    "--benchmark-disable", "--benchmark-skip", "-n2", "-n", "--dist=load",
])  # fmt: skip
def test_options_that_clash_are_refused_before_anything_runs(folder: Path, option: str):
    with pytest.raises(GateError, match="leave it out") as error:
        [*save_sessions("main", 3, [".", option])]
    assert error.value.code is Exit.USAGE
    assert "block" not in str(error.value)
    assert not Path(".benchmarks").exists()


@pytest.mark.parametrize(("name", "sessions", "says"), [
    ("", 3, "'' is no name"), ("a/b", 3, "'a/b' is no name"), ("a:b", 3, "without any of"),
    ("main", 0, "sessions=0 must be 1 or more"), ("main", -1, "sessions=-1 must be"),
])  # fmt: skip
def test_a_name_or_a_number_that_cannot_be_is_a_usage_error(
    folder: Path, name: str, sessions: int, says: str
):
    with pytest.raises(GateError, match=says) as error:
        [*save_sessions(name, sessions, ["."])]
    assert error.value.code is Exit.USAGE
    assert not Path(".benchmarks").exists()
