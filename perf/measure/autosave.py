"""A pytest plugin that saves a run after each of its benchmarks: what is cut off leaves what it had measured.

`-p perf.measure.autosave --perf-autosave FILE`. The file is as `--benchmark-json` writes it at the end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the file's name to the options."""
    parser.getgroup("dynamic-batch performance").addoption(
        "--perf-autosave", type=Path, metavar="FILE", help="save all that was measured here after each test"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Save during this session, if a file is named."""
    if config.getoption("--perf-autosave") is not None:
        config.pluginmanager.register(Autosave(config), "dynamic-batch-autosave")


class Autosave:
    """Writes the file anew after each test that added a benchmark."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.path = config, config.getoption("--perf-autosave")
        self.saved = 0
        self.about: dict[str, Any] | None = None  # machine and commit, which take a second to find out

    def pytest_runtest_logfinish(self) -> None:
        """Save; a benchmark that failed is left out, and a file that is there is whole at every moment."""
        session: Any = self.config.pluginmanager.get_plugin("pytest-benchmark")
        good = [benchmark for benchmark in session.benchmarks if not benchmark.has_error]
        if len(good) == self.saved:
            return
        hook = self.config.hook
        if self.about is None:
            commit = hook.pytest_benchmark_generate_commit_info(config=self.config)
            hook.pytest_benchmark_update_commit_info(config=self.config, commit_info=commit)
            self.about = {"machine_info": session.get_machine_info(), "commit_info": commit}
        run = hook.pytest_benchmark_generate_json(
            config=self.config, benchmarks=good, include_data=True, **self.about
        )
        hook.pytest_benchmark_update_json(config=self.config, benchmarks=good, output_json=run)
        self.saved = len(good)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(run, indent=1, default=str), encoding="utf-8")
        os.replace(fresh, self.path)
