"""What tests need that run a pytest session inside this one (pytester)."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.fixture(scope="module")
def imported() -> None:
    """Import what runs inside will need: pytester forgets modules that such a run was the first to import."""
    for name in ("perf.gate.verdict", "perf.report", "perf.gate.session_gate", "rich.table"):
        import_module(name)


@pytest.fixture
def processor_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pytest-benchmark not ask for the processor, which takes it a second a session."""
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)
