"""The GPU check on the CPU, with small folders of tests: real pytest runs, budgets, interrupts, codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from engine import InputError
from perf import gpu_check
from perf.cli import main
from perf.gpu_check import CUT_OFF, FOLDER, ORDER, ROOT, check_gpu, failures, last_line

CONFTEST = """
import pytest_benchmark.plugin
pytest_benchmark.plugin.get_cpu_info = dict  # it takes a second a session
pytest_plugins = ["perf.plugin"]
"""
GOOD = "def test_good(): pass\n"
BAD = "def test_bad(): assert 1 == 2\n"
TIMED = "def test_time(benchmark): benchmark.pedantic(lambda: None, rounds=6)\n"
SLOW = """
import pathlib, time
def test_slow():
    pathlib.Path("begun").touch()
    time.sleep(600)
"""
STUCK = """
import pathlib, signal, time
def test_stuck(benchmark):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a kernel that never returns
    pathlib.Path("begun").touch()
    time.sleep(600)
"""


class Check:
    """A checkout of small files, and what a check of it says."""

    def __init__(self, root: Path) -> None:
        self.root, self.out, self.said = root, root / "out", []
        (root / "conftest.py").write_text(CONFTEST)
        (root / "tests").mkdir()
        (root / "speed").mkdir()

    def write(self, tests: str, *benchmarks: str) -> None:
        (self.root / "tests" / "test_it.py").write_text(tests)
        for at, text in enumerate(benchmarks):
            (self.root / "speed" / f"test_{at}.py").write_text(text)

    def say(self, what: Any) -> None:
        console = Console(width=150)
        with console.capture() as captured:
            console.print(what)
        self.said.append(captured.get().strip())

    def run(self) -> int:
        return check_gpu(self.out, tests=["tests"], benchmarks=["speed"], say=self.say, root=self.root)

    def measured(self) -> list[str]:
        run = json.loads((self.out / "run.json").read_text())
        return [benchmark["fullname"] for benchmark in run["benchmarks"]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)  # workers take a second to start
    return Check(tmp_path)


@pytest.fixture
def spent_once_begun(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a budget be spent as soon as a test has made the file `begun`, however slow the machine is."""
    begun = check.root / "begun"

    class Process(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            while timeout == gpu_check.SECONDS and self.poll() is None:
                if begun.exists():
                    begun.unlink()
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.02)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Process)


def test_it_tests_then_measures_and_shows_a_table_last(check: Check):
    check.write(GOOD, TIMED)
    assert check.run() == 0
    assert check.said[0].startswith("tests: at most 275 s")
    assert check.said[1].startswith("tests: exit code 0; 1 passed in ")
    assert check.said[3].startswith("benchmarks: exit code 0; 1 passed in ")
    assert "test_time" in check.said[-1]
    assert "round time" in check.said[-1]
    assert check.measured() == ["speed/test_0.py::test_time"]
    assert "test_good PASSED" in (check.out / "tests.log").read_text()


def test_what_failed_is_said_before_anything_is_measured_and_is_the_exit_code(check: Check):
    check.write(GOOD + BAD, TIMED, BAD)
    assert check.run() == 1
    assert check.said[1] == "FAILED tests/test_it.py::test_bad - assert 1 == 2"
    assert check.said[2].startswith("tests: exit code 1; 1 failed, 1 passed in ")
    assert check.said[4].startswith("FAILED speed/test_1.py::test_bad")
    assert check.measured() == ["speed/test_0.py::test_time"]


@pytest.mark.usefixtures("spent_once_begun")
def test_a_benchmark_that_spends_the_budget_leaves_what_was_measured_before_it(
    check: Check, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)  # it heeds no Ctrl-C
    check.write(GOOD, TIMED, STUCK)
    assert check.run() == CUT_OFF
    assert check.measured() == ["speed/test_0.py::test_time"]
    assert check.said[-2].startswith("benchmarks: cut off at 275 s")
    assert "test_time" in check.said[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_what_is_there_and_leaves_no_process(
    check: Check, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)
    check.write(GOOD, TIMED, "import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\n" + STUCK)

    def interrupt() -> None:
        while not (check.root / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        check.run()
    thread.join()
    assert check.said[-2].startswith("benchmarks: interrupted")
    assert "test_time" in check.said[-1]
    assert check.measured() == ["speed/test_0.py::test_time"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((check.root / "pid").read_text()), 0)


@pytest.mark.usefixtures("spent_once_begun")
def test_a_budget_ends_tests_as_ctrl_c_does_and_the_benchmarks_still_run(check: Check):
    check.write(BAD + SLOW, TIMED)
    assert check.run() == CUT_OFF
    assert check.said[1] == "FAILED tests/test_it.py::test_bad - assert 1 == 2"
    assert check.said[2].startswith("tests: cut off at 275 s; ")
    assert check.measured() == ["speed/test_0.py::test_time"]


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert gpu_check._run(command, tmp_path / "log", 0.1, tmp_path) == CUT_OFF


def test_where_nothing_can_run_it_says_so(check: Check, tmp_path: Path):
    check.write(GOOD)
    assert check.run() == pytest.ExitCode.NO_TESTS_COLLECTED
    assert check.said[-1] == "nothing was measured"
    with pytest.raises(InputError, match="has no tests: run this in a checkout"):
        check_gpu(check.out, root=tmp_path / "tests")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"--out .*file is a file: name a folder"):
        check_gpu(file, root=check.root)


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("t.py::a FAILED [ 50%]\nFAILED t.py::a - assert 0\n", ["FAILED t.py::a - assert 0"]),
        ("t.py::a PASSED [ 9%]\nt.py::b FAILED  [ 50%]\nt.py::c ", ["t.py::b FAILED  [ 50%]"]),
        ("[gw1] [ 9%] ERROR t.py::a \n[gw0] [ 9%] PASSED t.py::b \n", ["[gw1] [ 9%] ERROR t.py::a "]),
        ("ERROR    engine:loop.py:99 a step failed\nt.py::a PASSED [ 9%]\n", []),
    ],
)
def test_failures_of_a_log_that_is_whole_or_was_cut_off(log: str, found: list[str]):
    assert failures(log) == found


def test_the_last_line_of_a_log_has_no_frame():
    assert last_line("a\n===== 3 passed in 2 s =====\n\n") == "3 passed in 2 s"
    assert last_line("\n") == "it said nothing"


def test_every_benchmark_of_a_gpu_is_in_the_order():
    files = {file.stem.removeprefix("test_") for file in (ROOT / FOLDER).glob("test_*.py")}
    assert sorted(ORDER) == sorted(
        files - {"counters", "replicas", "serve", "server"}
    )  # others need a server


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (124, 124), (KeyboardInterrupt, 130)])
def test_the_command_ends_with_its_code(
    ends: Any, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def check_gpu(out: Path, *, test_seconds: float, benchmark_seconds: float, say: Any) -> int:
        assert (out, test_seconds, benchmark_seconds) == (tmp_path, 9.0, gpu_check.SECONDS)
        say(Text("tests: [gw0] is text, not markup"))
        if ends is KeyboardInterrupt:
            raise KeyboardInterrupt
        return ends

    monkeypatch.setattr(gpu_check, "check_gpu", check_gpu)
    with pytest.raises(SystemExit) as ended:
        main(["check-gpu", "--out", str(tmp_path), "--test-seconds", "9"])
    assert ended.value.code == code
    assert capsys.readouterr().out == "tests: [gw0] is text, not markup\n"


def test_workers_share_the_tests_where_xdist_is_installed(check: Check, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []

    def run(command: list[str], log: Path, seconds: float, root: Path) -> int:
        commands.append(command)
        log.touch()
        return 0

    monkeypatch.setattr(gpu_check, "_run", run)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: object() if name == "xdist" else None)
    check.write(GOOD)
    assert check.run() == 0
    assert "--maxprocesses" in commands[0]
    assert "-n" not in commands[1], "what is measured runs alone"
