"""Saving of a pytest session: nothing that failed, no run without a timing, every benchmark's tolerances.

A benchmark that failed by what its user can mend (a server that is gone, a file that is none) says so in one
line, and a session in which nothing else failed has the exit code of that. A part of the plugin. It imports
pytest alone: the rest of the gate is for sessions that have a use for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from perf.shadow import USAGE

BENCHMARK = pytest.StashKey[Any]()  # a test's own `benchmark` fixture
TOLD = pytest.StashKey[list[int]]()  # of each benchmark that failed by what its user can mend
UNSAVED = pytest.StashKey[str]()  # the option that saved nothing
XDIST, DISABLE, SKIP = "-n (xdist)", "--benchmark-disable", "--benchmark-skip"
SAVING = ("--benchmark-save", "--benchmark-autosave", "--benchmark-json")


def benchmarks_off(config: pytest.Config) -> str | None:
    """The option that keeps pytest-benchmark from timing anything, if there is one."""
    if config.getoption("numprocesses", None) or config.getoption("dist", "no") != "no":
        return XDIST
    if config.getoption("benchmark_disable", False) and not config.getoption("benchmark_enable", False):
        return DISABLE
    skip = config.getoption("benchmark_skip", False) and not config.getoption("benchmark_only", False)
    return SKIP if skip else None


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Any:
    """Keep a test's `benchmark`, however the test came by it."""
    found = yield
    if fixturedef.argname == "benchmark" and hasattr(found, "has_error"):
        request.node.stash[BENCHMARK] = found
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Record the tolerances of a benchmark that knows nothing of `perf_case`, which records them itself."""
    found = yield
    measured = getattr(item.stash.get(BENCHMARK, None), "stats", None)  # None where disabled, or not used
    if measured is not None and item.get_closest_marker("perf_gate"):
        from perf.gate import entries, tolerances
        from perf.gate.metrics import TIME

        gate = None
        if entries.own(measured.extra_info) is None:
            gate = tolerances.used(*tolerances.of(item), {TIME})
        if gate:
            entries.write(measured.extra_info, {"gate": gate})
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Leave out what failed: pytest-benchmark alone would keep the time of a test that failed after it."""
    fixture = item.stash.get(BENCHMARK, None)
    report = yield
    if fixture is not None and call.excinfo is not None:
        fixture.has_error = True
        error = call.excinfo.value
        errors = sys.modules.get("engine.errors")  # where nobody has imported it, the error is none of its
        if errors is not None and isinstance(error, errors.InputError) and report.failed:
            report.longrepr = f"error: {error}"
            item.config.stash.setdefault(TOLD, []).append(int(getattr(error, "code", USAGE)))
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Keep pytest-benchmark from saving a run in which nothing was measured; the summary says so.

    The file of --benchmark-json is written even if every benchmark failed: no older one may be in its place.
    """
    config = session.config
    told = config.stash.get(TOLD, [])
    if told and len(told) == session.testsfailed and session.exitstatus == pytest.ExitCode.TESTS_FAILED:
        session.exitstatus = min(told)
    found: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    if found is not None and all(benchmark.has_error for benchmark in found.benchmarks):
        found.save = found.autosave = None
        found.json = found.json if found.benchmarks else None
        options = [option for option in SAVING if option != "--benchmark-json" or not found.json]
        if saving := next((option for option in options if config.getoption(option)), None):
            config.stash[UNSAVED] = saving
    return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if UNSAVED in config.stash:
        off = benchmarks_off(config)
        why = f", with {off}" if off else ""
        terminalreporter.write_line(
            f"{config.stash[UNSAVED]}: nothing was measured{why}, so nothing was saved"
        )
