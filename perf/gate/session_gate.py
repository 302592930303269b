"""Gate of a pytest session (`--perf-baseline`): a baseline before it, a comparison and a code at its end.

It prints nothing: perf/plugin.py shows what it found.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from perf.errors import Exit, GateError
from perf.gate.comparison import Comparison
from perf.gate.noise import Noise, read_noise
from perf.gate.saved_runs import Run, load, parse
from perf.gate.saving import XDIST
from perf.gate.storage import STORAGE, folder
from perf.gate.verdict import compare_saved


class SessionGate:
    """Compares a session with a baseline at its end, and sets its exit code.

    noise: the machine's, read before the session can save a run of its own. comparison: None before the end,
    and where `error` says why there is none. only_failed: whether --lf left out whatever did not fail.
    deselected: ids of tests that an option left out.
    """

    def __init__(self, base: Run, noise: Noise, only_failed: bool = False) -> None:
        self.base, self.noise = base, noise
        self.only_failed = only_failed
        self.deselected: set[str] = set()
        self.comparison: Comparison | None = None
        self.error: str | None = None

    @classmethod
    def of(cls, config: pytest.Config, baseline: str, off: str | None) -> SessionGate:
        """The gate of a session that begins; `baseline` and `off` are as for `check_session`.

        Raises:
            GateError: if the session could not answer it, or its baseline is not there.
        """
        storage = config.getoption("benchmark_storage", None)
        if storage is None:
            why = "needs pytest-benchmark: run without -p no:benchmark"
            raise GateError(f"--perf-baseline={baseline} {why}", Exit.USAGE)
        base = check_session(baseline, storage, off)
        cache = getattr(config, "cache", None)
        failed = cache.get("cache/lastfailed", {}) if cache and config.getoption("lf", False) else {}
        return cls(base, _noise(storage, base), only_failed=bool(failed))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected |= {item.nodeid for item in items}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        code = Exit.NOT_COMPARABLE
        try:
            head = parse(_measured(session.config), "this session")
            left_out = self._left_out(session)
            self.comparison = compare_saved(self.base, head, self.noise, deselected=left_out)
            code = self.comparison.exit
        except GateError as error:
            self.error, code = f"{error}", error.code
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = int(code)

    def _left_out(self, session: pytest.Session) -> set[str]:
        """Benchmarks of the baseline that nobody asked for: deselected, or outside the paths given."""
        known = set(self.base.benchmarks)
        left_out = self.deselected
        if self.only_failed:  # --lf does not even collect the files in which nothing failed
            left_out = left_out | (known - {item.nodeid for item in session.items})
        if session.config.args_source is not pytest.Config.ArgsSource.ARGS:
            return left_out
        root, here = session.config.rootpath, session.config.invocation_params.dir
        asked = []
        for argument in session.config.args:
            path, *inside = argument.split("::")
            asked.append("::".join([Path(os.path.relpath(here / path, root)).as_posix(), *inside]))
        return left_out | {name for name in known if not any(_is_in(name, part) for part in asked)}


def check_session(baseline: str | Path, storage: Path | str = STORAGE, off: str | None = None) -> Run:
    """The baseline of a session that will be gated, loaded before the session saves a run of the same name.

    Args:
        baseline: a run as `--perf-baseline` names it.
        off: the option that keeps the session from timing anything, if there is one.

    Raises:
        GateError: with code 2 if there is nothing to gate, 3 if the baseline is not there.
    """
    if off is None:
        return load(baseline, storage)
    why = ", and xdist turns benchmarks off" if off == XDIST else ""
    raise GateError(
        f"--perf-baseline={baseline} needs timings{why}: run without {off.split()[0]}", Exit.USAGE
    )


def _noise(storage: Path | str, base: Run) -> Noise:
    """The machine's noise as the storage tells it without the baseline; nothing where that is no folder."""
    try:
        folder(storage)
    except GateError as error:
        return Noise(notes=(f"this machine's noise is taken for unknown: {error}",))
    return read_noise(storage, [base])


def _measured(config: pytest.Config) -> dict[str, Any]:
    """The data that pytest-benchmark saves, or would save, of a session."""
    found: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    measured = [each.as_dict(include_data=True) for each in found.benchmarks if not each.has_error]
    return {"machine_info": found.get_machine_info(), "benchmarks": measured}


def _is_in(name: str, part: str) -> bool:
    """Return whether a test's id is that of a path, class or test that was asked for, or is in it."""
    return part in (".", name) or name.startswith((f"{part}/", f"{part}::", f"{part}["))
