"""One command for a machine with a GPU: the tests, then the benchmarks, and a short table last.

Both are pytest runs in processes of their own, each with a budget of seconds. One that spends it is
interrupted, as by Ctrl-C, and what it found and measured by then is said and kept.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.text import Text

from engine import InputError
from perf.errors import sigterm_interrupts
from perf.gate.saved_runs import load
from perf.report import runs_table
from perf.report.text import clean

ROOT = Path(__file__).parents[1]
FOLDER = "perf/benchmarks"
# The most wanted first: a budget may be spent before the last.
ORDER = ("roofline", "ttft", "batch_size", "idle", "startup", "policies", "memory", "scale", "peers", "load")
ON_GPU = ("-m", "gpu", "--require-gpu")
# A package that only other tests need may be missing.
TEST_ARGS = ("tests", *ON_GPU, "--continue-on-collection-errors")
BENCHMARK_ARGS = (*(f"{FOLDER}/test_{name}.py" for name in ORDER), *ON_GPU, "--quick")
SECONDS = 275.0  # for each half; with GRACE_S twice, the whole ends within ten minutes
GRACE_S = 20.0  # for an interrupted pytest to say what it has
WORKERS = 10  # of the tests, at most: most of their time is compiling kernels
MOST_LINES = 60  # of failures that are shown; the log has all
CUT_OFF = 124  # exit code of a half that spent its budget, as timeout(1) has it
IDLE = (
    "no kernel runs for {idle_pct:.0f} % of the time, {longest_gap_us:,.0f} us at most; "
    "{kernels_per_step:.0f} kernels a step"
)
Say = Callable[[Any], object]


def check_gpu(
    out: Path,
    *,
    tests: Sequence[str] = TEST_ARGS,
    benchmarks: Sequence[str] = BENCHMARK_ARGS,
    test_seconds: float = SECONDS,
    benchmark_seconds: float = SECONDS,
    say: Say = print,
    root: Path = ROOT,
) -> int:
    """Run the tests and then the benchmarks; return the tests' exit code, or the benchmarks' if that is 0.

    Args:
        out: the folder that gets tests.log, benchmarks.log, run.json (a saved run) and the trace.
        tests, benchmarks: what pytest is given, from `root` on.
        test_seconds, benchmark_seconds: the budget of each.
        say: called with what to show as it comes, as rich prints it; the table is last.

    Raises:
        InputError: if `root` is no checkout, or `out` no folder.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, after it said what was there by then.
    """
    if not (root / "tests").is_dir():
        raise InputError(f"{root} has no tests: run this in a checkout of dynamic-batch")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    (out / "run.json").unlink(missing_ok=True)  # of another check
    workers = ("-n", "auto", "--maxprocesses", str(WORKERS)) if find_spec("xdist") else ()
    saving = ("-p", "perf.measure.autosave", "--perf-autosave", str(out / "run.json"))
    try:
        code = _half("tests", out, (*workers, "--durations=10", *tests), test_seconds, say, root)
        options = ("--benchmark-quiet", *saving, f"--perf-trace={out}")
        measured = _half("benchmarks", out, (*options, *benchmarks), benchmark_seconds, say, root)
    finally:
        _show_run(out / "run.json", say)
    return code or measured


def _half(name: str, out: Path, args: Sequence[str], seconds: float, say: Say, root: Path) -> int:
    """Run pytest, its output in a log; say what failed, and how it ended. Return its exit code."""
    log, started = out / f"{name}.log", time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", *args]
    say(Text(f"{name}: at most {seconds:.0f} s; {log}"))
    code = None
    try:
        code = _run(command, log, seconds, root)
    finally:
        text = log.read_text(encoding="utf-8", errors="replace")
        for line in failures(text)[:MOST_LINES]:
            say(Text(clean(line), style="red"))
        ended = {None: "interrupted", CUT_OFF: f"cut off at {seconds:.0f} s"}.get(code, f"exit code {code}")
        say(Text(f"{name}: {ended}; {last_line(text)}; {time.perf_counter() - started:.0f} s in all"))
    return code


def failures(log: str) -> list[str]:
    """Return what failed by a pytest log: the lines of its summary, or where it has none, of its progress."""
    summary = [line for line in log.splitlines() if re.match(r"(FAILED|ERROR) \S", line)]
    progress = r"(::.* (FAILED|ERROR)\b)|(\] (FAILED|ERROR) )"
    return summary or [line for line in log.splitlines() if re.search(progress, line)]


def last_line(log: str) -> str:
    """Return the last line of a log that says something, without its frame."""
    lines = [line.strip("= \n") for line in log.splitlines() if line.strip("= \n")]
    return clean(lines[-1]) if lines else "it said nothing"


def _run(command: Sequence[str], log: Path, seconds: float, root: Path) -> int:
    """Run a command for so many seconds; return its exit code, or CUT_OFF.

    In any case no process of it is left: a test's worker would slow whatever is measured next.
    """
    with log.open("wb") as file, sigterm_interrupts():
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=root, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            return code if code >= 0 else 128 - code  # as a shell tells of a signal
        except subprocess.TimeoutExpired:
            return CUT_OFF
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that still runs, so that it says what it has; kill what is left of its group."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    finally:
        with suppress(ProcessLookupError):  # it left nobody
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _show_run(path: Path, say: Say) -> None:
    """Say what was measured, as a table."""
    if not path.is_file():
        say(Text("nothing was measured"))
        return
    run = load(str(path), path.parent)
    for name, benchmark in run.benchmarks.items():
        if benchmark.info.get("idle_pct") is not None:
            say(Text(f"{name.rpartition('::')[2]}: {IDLE.format_map(benchmark.info)}"))
    say(runs_table([run]))
