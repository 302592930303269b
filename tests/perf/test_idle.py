"""Decode watched from outside: gaps between kernels from a trace, NVML only while every request decodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import Engine, EngineConfig, load
from perf.benchmarks.workloads import fixed
from perf.measure.idle import TRACED_STEPS, WARM_UP_STEPS, by_kernel, decoding, gaps, idle_time, utilisation
from tests.serving import use_cuda_backend


def kernel(begin: float, microseconds: float, category: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": category, "ts": begin, "dur": microseconds}


def test_gaps_are_the_time_in_which_nothing_runs():
    events = [
        kernel(110.0, 10.0),
        kernel(100.0, 5.0),  # a trace is in no order: 5 us until the next
        kernel(112.0, 2.0, "gpu_memcpy"),  # within another
        kernel(115.0, 10.0, "gpu_memset"),  # overlaps it, and ends at 125
        kernel(140.0, 10.0),  # 15 us later
        kernel(0.0, 500.0, "cpu_op"),  # no work of the GPU
        {"ph": "M", "name": "process_name"},
    ]
    found = gaps(events, steps=2)
    assert found == {"idle_pct": 100 * 20 / 50, "longest_gap_us": 15.0, "kernels_per_step": 2.5}


def test_a_kernel_costs_what_lies_between_its_end_and_the_one_before():
    events = [
        kernel(100.0, 5.0) | {"name": "first", "args": {"grid": [8, 1, 1]}},
        kernel(101.0, 9.0) | {"name": "early", "args": {"grid": [1, 1, 1]}},  # begins while the first runs
        kernel(111.0, 3.0) | {"name": "first", "args": {"grid": [8, 1, 1]}},
        kernel(0.0, 500.0, "cpu_op") | {"name": "no kernel"},
    ]
    rows = by_kernel(events[::-1], steps=1)
    first = {"kernel": "first", "grid": "[8, 1, 1]", "a_step": 2.0, "us": (5 + 4) / 2, "own_us": 4.0}
    early = {"kernel": "early", "grid": "[1, 1, 1]", "a_step": 1.0, "us": 5.0, "own_us": 9.0}
    assert rows == [first, early]
    assert by_kernel(events[3:], 1) == []


def test_a_trace_without_kernels_has_no_gaps():
    nothing = {"idle_pct": None, "longest_gap_us": None, "kernels_per_step": None}
    assert gaps([kernel(0.0, 5.0, "cpu_op")], 40) == nothing


@pytest.fixture(params=["as it is", "tokens come a step late"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on the CPU, with its own backend or with a GPU's, kernels aside."""
    if request.param != "as it is":
        use_cuda_backend(monkeypatch)
    config = EngineConfig(max_batch_size=4, prefix_caching=False, generation_config="none")
    return Engine(load("random:tiny-llama", dtype="float64"), config)


def test_steps_of_steady_decode_are_traced_and_kept_where_asked(server: Engine, tmp_path: Path):
    kept = tmp_path / "new" / "trace.json"
    with decoding(server, fixed(3, 8, 90, 256).items):
        before = dict(server.metrics.counters.batch_sizes)
        found = idle_time(server, "cpu", kept)
        after = server.metrics.counters.batch_sizes
    assert after[3] - before.get(3, 0) == WARM_UP_STEPS + TRACED_STEPS
    assert set(found.values()) == {None}  # a CPU runs no kernel
    assert json.loads(kept.read_text())["traceEvents"]
    assert json.loads(kept.with_name("trace-kernels.json").read_text()) == []
    assert not server.scheduler.has_work  # all were aborted


def test_nvml_is_read_only_while_every_request_decodes(server: Engine):
    with decoding(server, fixed(3, 8, 90, 256).items):
        assert utilisation(server, "cpu", 0.0, 0.0).reason == "cpu is no NVIDIA GPU"
    with decoding(server, fixed(3, 8, 4, 256).items):
        assert utilisation(server, "cpu", 60.0, 60.0).reason == "a request ended before its decoding was read"


def test_requests_that_never_decode_together_are_an_error(server: Engine):
    short, long = fixed(1, 8, 1, 256).items[0], fixed(1, 8, 50, 256).items[0]
    early = pytest.raises(RuntimeError, match="a request ended before all of them were decoding")
    with early, decoding(server, [short, long]):
        pass
    assert not server.scheduler.has_work
