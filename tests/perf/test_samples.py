"""A round's sample: what the gate is handed of it, and that what is saved is made of the same."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from perf.benchmarks.workloads import fixed
from perf.gate.metrics import GATED, METRICS, POOLED
from perf.gate.pooling import gathered
from perf.measure import host_memory
from perf.measure.host_memory import HostMemory
from perf.measure.nvml import GpuReading
from perf.measure.session import BenchSession
from perf.measure.trial import Trial
from tests.perf.test_case import Scripted

pytestmark = pytest.mark.usefixtures("imported_for_measuring", "quick_machine_speed")
COUNTERS = {name for name in GATED if METRICS[name].is_counter}


@pytest.fixture(scope="module")
def bench() -> BenchSession:
    return BenchSession(model="random:tiny-llama", dtype=None, rounds=None, quick=False, inject_slowdown=0.0)


def made(bench: BenchSession, backend: Any, workload: Any = None, **how: Any) -> Trial:
    workload = workload or fixed(3, 8, 4, 256)
    return Trial(bench, "batch_size", backend, workload, device="cpu", max_batch_size=2, **how)


def one_round(trial: Trial) -> dict[str, Any]:
    trial.before()
    trial.run()
    return trial.after()


def test_a_sample_has_every_gated_metric_and_of_pooled_ones_the_values(bench: BenchSession):
    trial = made(bench, Scripted())
    found = one_round(trial)
    # each token 10 ms after the last: 3 requests of 4 tokens
    assert found["tpot_p95_ms"] == pytest.approx([10.0] * 3)
    assert found["itl_p99_ms"] == pytest.approx([10.0] * 9)
    assert found["tokens_per_s"] == trial.rounds[0].flat["tokens_per_s"]
    assert found["output_tokens"] == 12
    flat = trial.rounds[0].flat
    assert set(found) == {name for name in GATED if flat.get(name) is not None}
    assert set(found) & COUNTERS == {"output_tokens", "prompt_tokens_cached"}  # it counts no steps
    assert {name for name, value in found.items() if isinstance(value, list)} == set(POOLED)


def test_an_engine_that_counts_its_steps_has_every_counter(bench: BenchSession):
    trial = made(bench, "continuous")
    assert set(one_round(trial)) > COUNTERS
    trial.close()


def test_what_is_saved_is_made_of_the_samples(bench: BenchSession):
    trial = made(bench, Scripted())
    found = [one_round(trial) for _ in range(4)]
    rounds, tails = gathered(found)
    info = trial.info()
    assert info["rounds"] == rounds
    assert {name: info[name] for name in tails} == tails
    assert rounds["tokens_per_s"] == [sample["tokens_per_s"] for sample in found]
    assert rounds["tpot_p95_ms"] == [pytest.approx(10.0)]
    assert (info["tpot_p95_n"], info["itl_p99_n"]) == (12, 36)


def test_tails_are_recorded_by_section_and_over_all_rounds():
    rng = np.random.default_rng(0)
    samples = [{"tpot_p95_ms": rng.exponential(1.0, 90).tolist(), "goodput": 1.0} for _ in range(7)]
    rounds, tails = gathered(samples)
    values = [sample["tpot_p95_ms"] for sample in samples]
    wanted = [np.percentile(np.concatenate(part), 95) for part in (values[:3], values[3:])]
    assert rounds == {"goodput": [1.0] * 7, "tpot_p95_ms": pytest.approx(wanted)}
    assert tails["tpot_p95_ms"] == pytest.approx(np.percentile(np.concatenate(values), 95))
    assert tails["tpot_p95_n"] == 270
    assert (tails["itl_p99_ms"], tails["itl_p99_n"]) == (None, None)


def test_what_one_round_lacks_is_not_recorded():
    rounds, tails = gathered([{"goodput": 1.0, "itl_p99_ms": [1.0]}, {"tokens_per_s": 1.0}])
    assert (rounds, tails["itl_p99_ms"]) == ({}, None)


def test_without_times_or_a_second_token_there_are_no_tails(bench: BenchSession):
    untimed = Scripted()
    untimed.keeps_times = False
    for trial in (made(bench, untimed), made(bench, Scripted(), fixed(3, 8, 1, 256))):
        assert not set(POOLED) & set(one_round(trial))
        info = trial.info()
        assert not set(POOLED) & set(info["rounds"])
        assert {info[name] for name in (*POOLED, "tpot_p95_n", "itl_p99_n")} == {None}


def test_of_open_load_a_sample_has_no_counters(bench: BenchSession):
    trial = made(bench, "continuous", "mixed-2", arrivals="poisson:1000")
    found = one_round(trial)
    assert not COUNTERS & set(found)
    assert "tokens_per_s" in found
    trial.close()


def test_a_round_that_a_slowdown_hit_says_so(bench: BenchSession):
    trial = made(bench, Scripted())
    assert "voided" not in one_round(trial)
    trial._monitor.reading = GpuReading(slowdown="hardware thermal slowdown")
    assert one_round(trial)["voided"] == "hardware thermal slowdown"


# Memory of the host


def test_peak_host_memory_is_of_each_round(bench: BenchSession):
    """The second of three rounds holds 256 MiB for a moment; 512 that were held before count in none."""
    if not HostMemory().has_peak:
        pytest.skip("this system does not let its high-water mark be reset")
    sizes = iter([0, 0, 256, 0])

    def hold(run: int, tokens: list[list[int]]) -> None:
        np.ones(next(sizes) << 17)  # float64

    trial = made(bench, Scripted(hold))
    trial.prove()
    np.ones(512 << 17)
    peaks = [one_round(trial)["rss_peak_bytes"] / 2**20 for _ in range(3)]
    trial.close()
    assert peaks[1] - peaks[0] == pytest.approx(256, abs=64)
    assert peaks[2] - peaks[0] == pytest.approx(0, abs=64)


def test_free_memory_under_a_small_block_is_given_back():
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype = ctypes.c_void_p
    blocks = [libc.malloc(1 << 14) for _ in range(4000)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 14)
    last = libc.malloc(1 << 14)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
    before = psutil.Process().memory_info().rss
    host_memory.give_back()
    assert psutil.Process().memory_info().rss < before - 2000 * (1 << 14)
    libc.free(ctypes.c_void_p(last))


@pytest.mark.parametrize("status", [None, "VmRSS:\t 7 kB\n", "VmHWM:\t 7 kB\n"])
def test_where_the_peak_cannot_be_reset_it_is_what_is_resident_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None
):
    if status is not None:
        (tmp_path / "status").write_text(status)
    (tmp_path / "clear_refs").mkdir()  # may not be written, whoever runs this
    memory = HostMemory(tmp_path)
    resident = type("Process", (), {"memory_info": lambda self: type("Info", (), {"rss": 12345})})
    monkeypatch.setattr(host_memory.psutil, "Process", resident)
    assert not memory.has_peak
    memory.begin()
    assert memory.peak() == 12345


def test_the_mark_is_reset_and_read(tmp_path: Path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t 7 kB\n")
    memory = HostMemory(tmp_path)
    (tmp_path / "clear_refs").unlink()
    memory.begin()
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert memory.peak() == 2 * 2**20


def test_memory_of_a_model_in_another_process_is_not_this_one_s(bench: BenchSession):
    backend = Scripted()
    backend.in_process = False  # type: ignore[attr-defined]
    trial = made(bench, backend)
    assert "rss_peak_bytes" not in one_round(trial)
    assert trial.info()["rss_peak_bytes"] is None


# Garbage


def test_a_round_s_garbage_is_collected_and_what_was_there_before_is_left_alone(
    bench: BenchSession, monkeypatch: pytest.MonkeyPatch
):
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    done: list[str] = []
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append("unfreeze"))
    trial = made(bench, Scripted())
    trial.prove()
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    assert len(gc.get_objects()) < frozen / 10
    dropped = weakref.ref(Cycle())
    trial.before()
    assert dropped() is None
    assert done == []
    trial.close()
    assert done == ["unfreeze"]
