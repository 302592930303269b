"""The suite's options and fixtures, for every test; and where the tests run. It imports no torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.machine import processors

pytest_plugins = ["perf.plugin"]

TESTS = Path(__file__).parent / "tests"
MEASURING = ("benchmark_save", "benchmark_autosave", "benchmark_json", "benchmark_only", "perf_baseline")
MAX_WORKERS = 8  # each takes a gigabyte


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread the tests over the processors. Whatever is timed runs alone, and without paths is perf too.

    Without paths `pytest` runs the tests; with an option that saves or judges timings, and with `-m gpu`, the
    benchmarks as well. `-n` overrules it.
    """
    measuring = config.option.markexpr == "gpu" or any(config.getoption(name, None) for name in MEASURING)
    if measuring and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args.append("perf")
    tests_alone = all(_is_folder_of_tests(config, argument) for argument in config.args)
    given = config.getoption("numprocesses", 0) is not None  # by -n; 0 where xdist is not installed
    options = config.option
    if measuring or given or not tests_alone or options.usepdb or options.collectonly:
        return
    workers = min(processors(), MAX_WORKERS)
    if workers > 1 and options.dist == "no" and not hasattr(config, "workerinput"):
        options.numprocesses, options.dist, options.tx = workers, "loadfile", ["popen"] * workers


def _is_folder_of_tests(config: pytest.Config, argument: str) -> bool:
    """Whether an argument is a folder that has nothing but tests in it, and so many files."""
    path = config.invocation_params.dir / argument
    return path.is_dir() and path.resolve().is_relative_to(TESTS)
