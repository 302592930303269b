"""The pytest plugin: options, fixtures, the points a test runs at, and what is shown at the end of a session.

Loaded by the root conftest, or by `-p perf.plugin` in a project of your own. It imports no torch by itself:
plain unit tests must not wait for it. What a session saves is in perf/gate/saving.py, its gate in
perf/gate/session_gate.py.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from perf import config as project, server_options
from perf.gate import saving
from perf.option_types import check_whole, integers, names, positive, seconds, slowdown
from perf.shadow import USAGE

if TYPE_CHECKING:
    from perf.gate.session_gate import SessionGate
    from perf.measure.case import PerfCase
    from perf.measure.session import BenchSession
    from perf.measure.trial import Trial

RECORDED = pytest.StashKey[Sequence[dict[str, Any]]]()
GATE = pytest.StashKey["SessionGate"]()
SETTINGS = pytest.StashKey[project.Settings]()
STORAGE = "--benchmark-storage"
FROM_SETTINGS = (
    "model",
    "dtype",
    *server_options.FROM_SETTINGS,
)  # options whose default is in the project's settings, by their dest
TURNS = "dynamic-batch-turns"  # see perf/ab/turn_agent.py
SET = f"default: that of [{'.'.join(project.PATH)}]"
TABLE_WIDTH, GATE_WIDTH = 100, 160  # columns of what is shown at the end where there is no terminal
MARKERS = (
    "gpu: needs a CUDA device",
    "perf_gate(metric, rel=None, abs=None): this test's own tolerance for one metric; the closest mark wins",
    "points(name, cpu=[...], cuda=[...], quick=[...]): values of a parameter on each device, and of --quick",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("dynamic-batch performance").addoption
    add("--require-gpu", action="store_true", help="fail, rather than skip, gpu tests without a CUDA device")
    add("--model", help=f"model spec of the benchmarks ({SET}, else random:tiny-llama, on CUDA qwen2.5-0.5b)")
    add("--dtype", help=f"dtype of the benchmarks, int8 on a CPU too ({SET}, else float32, on CUDA float16)")
    add("--batch-sizes", type=integers, metavar="N,N", help="batch sizes of the sweep, and of peers")
    add("--rounds", type=positive, metavar="N", help="timed rounds of each perf_case benchmark")
    timed = "seconds to time on a CPU, 5 rounds or more, where nothing says how many (default: 1.0)"
    add("--min-time", type=seconds, default=1.0, metavar="SECONDS", help=timed)
    add("--quick", action="store_true", help="fewer points and rounds: 2 minutes on a GPU, not 8")
    add("--peers", type=names, metavar="A,B", help="what the peers benchmark compares, in this order")
    add("--backend", action="append", default=[], metavar="MODULE:ATTR", help="one more peer; repeatable")
    add("--perf-trace", type=Path, metavar="FOLDER", help="keep the trace of the idle benchmark here")
    add("--perf-baseline", metavar="NAME|FILE", help="compare with this saved run at the end, and gate")
    injected = "slow the engine down, to test the gate: 0.05 (all steps), 0.2@chunks, 1.5@10 (each tenth)"
    add("--perf-inject-slowdown", type=slowdown, default=0.0, metavar="FRACTION[@WHICH]", help=injected)

    server_options.add_options(add)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(saving)
    config.pluginmanager.register(server_options)
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    baseline = config.getoption("--perf-baseline")
    if config.getoption("help", False) or config.getoption("markers", False):
        return  # no session follows
    _use_settings(config)
    if baseline is None or hasattr(config, "workerinput"):
        return
    check_whole()
    from perf.errors import GateError
    from perf.gate.session_gate import SessionGate

    off = saving.benchmarks_off(config)
    if off is None and config.getoption("collectonly", False):
        off = "--collect-only"
    try:
        gate = SessionGate.of(config, baseline, off)
    except GateError as error:
        pytest.exit(f"error: {error}", returncode=int(error.code))
    config.stash[GATE] = gate
    config.pluginmanager.register(gate)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have the project's tolerances hold for every test, as the farthest of its marks."""
    for metric, limits in session.config.stash[SETTINGS].tolerances.items():
        session.add_marker(pytest.mark.perf_gate(metric, **limits))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize over (device, NAME) for each `points` mark, and over the device alone without one."""
    if "server_load" in metafunc.fixturenames:
        server_options.parametrize(metafunc)
        return
    if "device" not in metafunc.fixturenames or "perf_case" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("points")
    sizes = metafunc.config.getoption("--batch-sizes")
    quick = metafunc.config.getoption("--quick")
    rows = []
    for device in ("cpu", "cuda"):
        marks = (pytest.mark.gpu,) if device == "cuda" else ()
        if mark is None:
            rows.append(pytest.param(device, id=device, marks=marks))
            continue
        values, left_out = mark.kwargs[device], []
        if quick and device == "cuda":
            left_out = [value for value in values if value not in mark.kwargs.get("quick", values)]
        if mark.args[0] == "batch_size" and sizes:
            values = sizes
        if mark.args[0] == "peer":
            values = [
                *(metafunc.config.getoption("--peers") or values),
                *metafunc.config.getoption("--backend"),
            ]
        for value in values:
            skip = (pytest.mark.skip(reason="left out by --quick"),) if value in left_out else ()
            rows.append(pytest.param(device, value, id=f"{device}-{_label(value)}", marks=(*marks, *skip)))
    metafunc.parametrize(["device"] if mark is None else ["device", mark.args[0]], rows)
    if sizes and "peers_at_once" in metafunc.fixturenames:
        metafunc.parametrize("peers_at_once", sizes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = any(item.get_closest_marker("perf_gate") for item in items)
    if marked or any("perf_bench" in _fixtures(item) for item in items):
        check_whole()
    if marked:
        from perf.errors import GateError
        from perf.gate import tolerances

        narrowed = config.getoption("lf", False) or any("::" in argument for argument in config.args)
        try:
            tolerances.check(items, narrowed)
        except GateError as error:
            pytest.exit(f"error: {error}", returncode=int(error.code))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu and not config.getoption("--require-gpu"):
        return
    import torch

    if torch.cuda.is_available():
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError("--require-gpu: torch finds no CUDA device here, so no gpu test can run")
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


@pytest.fixture(scope="session")
def perf_bench(request: pytest.FixtureRequest) -> Iterator[BenchSession]:
    """The options and the model that the session's benchmarks share."""
    from perf.measure.session import BenchSession
    from perf.measure.slo import Slo

    shared = ("model", "dtype", "rounds", "quick")
    slo = request.config.getoption("--slo")
    bench = BenchSession(
        **{name: request.config.getoption(f"--{name}") for name in shared},
        min_time=request.config.getoption("--min-time"),
        slo=None if slo is None else Slo.parse(slo),
        inject_slowdown=request.config.getoption("--perf-inject-slowdown"),
    )
    request.config.stash[RECORDED] = bench.recorded
    yield bench
    bench.drop()


@pytest.fixture
def peers_at_once() -> int | None:
    """The batch size of peers, one after the other of `--batch-sizes`; None without."""
    return None


@pytest.fixture(scope="session")
def peer_rounds(
    request: pytest.FixtureRequest, perf_bench: BenchSession
) -> Callable[..., dict[str, Trial | Exception]]:
    """`peer_rounds(device, workload, batch_size, rounds)`: every peer that this session selected for the
    device, run in turns; a finished trial each, or why there is none. Run at a batch size's first call."""
    from perf.measure.interleave import run_peers

    known: dict[tuple[str, int], dict[str, Trial | Exception]] = {}

    def get(device: str, workload: str, batch_size: int, rounds: int) -> dict[str, Trial | Exception]:
        key = device, batch_size
        if key not in known:
            items = (item for item in request.session.items if "peer_rounds" in _fixtures(item))
            chosen = [_parameters(item) for item in items if not item.get_closest_marker("skip")]
            peers = list(dict.fromkeys(params["peer"] for params in chosen if params["device"] == device))
            known[key] = run_peers(perf_bench, peers, workload, device, batch_size, rounds)
        return known[key]

    return get


@pytest.fixture
def perf_case(request: pytest.FixtureRequest, perf_bench: BenchSession, benchmark: Any) -> Iterator[PerfCase]:
    """Measures one thing: `perf_case.measure(group, backend, workload, device=..., max_batch_size=...)`."""
    import torch

    from perf.gate import tolerances
    from perf.measure.case import PerfCase

    threads = torch.get_num_threads()
    if "tiny" in perf_bench.spec(request.getfixturevalue("device")):
        torch.set_num_threads(1)  # dividing their products among several takes longer than computing them
    yield PerfCase(perf_bench, benchmark, *tolerances.of(request.node))
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if GATE in config.stash:
        _show_gate(terminalreporter, config.stash[GATE])
    if RECORDED not in config.stash or config.pluginmanager.has_plugin(TURNS):
        return  # nobody reads the tables of a process that takes turns
    from perf.report.session_tables import tables
    from perf.report.terminal import drawn

    width = config.get_terminal_writer().fullwidth if terminalreporter.isatty else TABLE_WIDTH
    for title, table in tables(config.stash[RECORDED]):
        terminalreporter.section(title)
        for line in drawn(table, width):
            terminalreporter.write_line(line)


def _use_settings(config: pytest.Config) -> None:
    """Read the settings of the project whose tests these are, and give them to options that were not given.

    That of where runs are saved is pytest-benchmark's, whose own default says nothing of who gave it.
    """
    try:
        settings = project.load(config.rootpath)
        if settings.tolerances:
            check_whole()
            from perf.gate import tolerances

            tolerances.check_settings(settings)
    except project.SettingsError as error:
        pytest.exit(f"error: {error}", returncode=USAGE)
    config.stash[SETTINGS] = settings
    for name in FROM_SETTINGS:
        if not config.getoption(name):
            setattr(config.option, name, settings.default(name))
    added = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *config.getini("addopts")]
    given = any(str(arg).startswith(STORAGE) for arg in (*added, *config.invocation_params.args))
    if settings.storage and not given and config.getoption("benchmark_storage", None) is not None:
        config.option.benchmark_storage = settings.storage


def _show_gate(terminalreporter: Any, gate: SessionGate) -> None:
    terminalreporter.section(f"against {gate.base.name}")
    if gate.error:
        terminalreporter.write_line(f"error: {gate.error}")
    if gate.comparison is not None:
        from perf.report import comparison_table
        from perf.report.terminal import show

        show(comparison_table(gate.comparison), GATE_WIDTH, terminalreporter._tw._file)


def _label(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(item, "callspec").params  # noqa: B009 (pytest has no public name for it)
