"""What `--perf-baseline` adds to a pytest session: a baseline before it, a comparison at its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from perf.gate import verdict as gate
from perf.gate.saved_runs import Exit, GateError, Run, parse

if TYPE_CHECKING:
    from perf.gate.verdict import Comparison


class Gate:
    """Compares the session with a baseline at its end, and sets the exit code."""

    def __init__(self, base: Run, only_failed: bool = False) -> None:
        self.base = base
        self.only_failed = only_failed
        self.deselected: set[str] = set()
        self.comparison: Comparison | None = None
        self.error: str | None = None

    @classmethod
    def of(cls, config: pytest.Config, baseline: str, **off: bool) -> Gate:
        """The gate of a session that begins; `off` is as for `perf.gate.verdict.check_session`.

        Raises:
            GateError: if the session could not answer it, or its baseline is not there.
        """
        storage = config.getoption("benchmark_storage", None)
        if storage is None:
            why = "needs pytest-benchmark: run without -p no:benchmark"
            raise GateError(f"--perf-baseline={baseline} {why}", Exit.USAGE)
        base = gate.check_session(baseline, storage, **off)
        cache = getattr(config, "cache", None)
        failed = cache.get("cache/lastfailed", {}) if cache and config.getoption("lf", False) else {}
        return cls(base, only_failed=bool(failed))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected |= {item.nodeid for item in items}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        code = Exit.NOT_COMPARABLE
        try:
            head = parse(self._measured(session.config), "this session")
            self.comparison = gate.compare(self.base, head, deselected=self._left_out(session))
            code = self.comparison.exit
        except GateError as error:
            self.error, code = f"{error}", error.code
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = int(code)

    def _measured(self, config: pytest.Config) -> dict[str, Any]:
        """What pytest-benchmark saves, or would save, of this session."""
        found: Any = config.pluginmanager.get_plugin("pytest-benchmark")
        measured = [each.as_dict(include_data=True) for each in found.benchmarks if not each.has_error]
        return {"machine_info": found.get_machine_info(), "benchmarks": measured}

    def _left_out(self, session: pytest.Session) -> set[str]:
        """Benchmarks of the baseline that nobody asked for: deselected, or outside the paths given."""
        left_out = self.deselected
        if self.only_failed:  # --lf does not even collect the files in which nothing failed
            left_out = left_out | (set(self.base.benchmarks) - {item.nodeid for item in session.items})
        if session.config.args_source is not pytest.Config.ArgsSource.ARGS:
            return left_out
        root, here = session.config.rootpath, session.config.invocation_params.dir
        asked = []
        for argument in session.config.args:
            path, *inside = argument.split("::")
            asked.append("::".join([Path(os.path.relpath(here / path, root)).as_posix(), *inside]))

        def is_in(name: str, part: str) -> bool:
            return part in (".", name) or name.startswith((f"{part}/", f"{part}::", f"{part}["))

        known = self.base.benchmarks
        return left_out | {name for name in known if not any(is_in(name, part) for part in asked)}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"against {self.base.name}")
        if self.error:
            terminalreporter.write_line(f"error: {self.error}")
        if self.comparison is not None:
            from rich.console import Console

            from perf.report import comparison_table

            console = Console(width=None if sys.stdout.isatty() else 160, file=terminalreporter._tw._file)
            console.print(comparison_table(self.comparison))
