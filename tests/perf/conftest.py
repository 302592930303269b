"""Fixtures of tests that run a pytest session inside this one, in its process (pytester) or in another."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def session_of_its_own() -> Iterator[None]:
    """Hide from the sessions inside that this one may be a worker of xdist, where nobody benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST_", "PYTEST_ADDOPTS"))]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def imported() -> None:
    """Import what runs inside will need: pytester forgets modules that such a run was the first to import."""
    for name in ("perf.gate.verdict", "perf.report", "perf.gate.session_gate", "rich.table"):
        import_module(name)


@pytest.fixture(scope="session")
def imported_for_measuring() -> Iterator[None]:
    """Import what measuring needs, and have no collection of garbage look through it again.

    A measurement collects garbage before each round, which would take longer than its tests. And pytester
    forgets modules that a session inside was the first to import.
    """
    from perf.measure.session import BenchSession
    from perf.measure.trial import Trial

    bench = BenchSession(model=None, dtype=None, rounds=None, quick=False, inject_slowdown=0.0)
    trial = Trial(bench, "load", "continuous", "mixed-2", device="cpu", max_batch_size=2)
    trial.prove()
    trial.before()
    trial.run()
    trial.after()
    trial.info()
    trial.close()
    bench.drop()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)  # which a trial that is closed would undo
        yield


@pytest.fixture
def quick_machine_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the machine rates of its own, 100 GFLOP/s and 10 GB/s, instead of measuring them."""
    from perf.measure import machine_speed

    speed = machine_speed.MachineSpeed(100.0, 10.0)
    monkeypatch.setattr(machine_speed, "measure", lambda *args, **how: speed)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """c0 to c16 in a row, for tests of `perf bisect`."""
    from tests.perf.bisected import row

    return row(tmp_path_factory.mktemp("line") / "repo")


@pytest.fixture
def repo(line: Path) -> Iterator[Path]:
    """c0 to c16, which must stay as they are, with all that git knows."""
    from tests.perf.bisected import state

    before = state(line)
    yield line
    assert state(line) == before


@pytest.fixture
def few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sessions in other processes load pytest-benchmark alone: other plugins take them seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_benchmark.plugin")


@pytest.fixture
def processor_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pytest-benchmark not ask for the processor, which takes it a second a session."""
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`refused(tool, *paths)` gives the code and the message, after it has seen that nothing was saved."""
    from perf import cli

    def call(tool: str, *paths: Path, **options: str) -> tuple[int, str]:
        storage = tmp_path / "storage"
        args = ["import", tool, *map(str, paths), "--save", options.get("save", "main")]
        with pytest.raises(SystemExit) as end:
            cli.main([*args, "--storage", str(storage)])
        assert not storage.exists()
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return int(str(end.value.code)), err.removeprefix("error: ").rstrip("\n")

    return call
