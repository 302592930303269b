"""The machine's rates: random data, the fastest repeat, and the drift that tells a changed machine from
changed code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from perf.measure import machine_speed
from perf.measure.machine_speed import MachineSpeed, measure


def test_rates_are_work_over_the_fastest_repeat_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch):
    # the product's, then the copy's
    lengths = iter([9e-9, 4e-3, 2e-3, 8e-3, 5e-3, 9e-9, 1e-3, 1e-3, 1e-3, 1e-3])

    def ticks() -> Iterator[float]:
        now = 0.0
        for length in lengths:
            yield now
            now += length
            yield now

    clock = ticks()
    monkeypatch.setattr(machine_speed.time, "perf_counter", lambda: next(clock))
    found = measure("cpu", "float64", size=64, copy_bytes=1 << 20)
    assert found.matmul_gflops == pytest.approx(2 * 128 * 64 * 64 / 2e-3 / 1e9)
    assert found.copy_gbps == pytest.approx(2 * (1 << 20) / 1e-3 / 1e9)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_what_is_multiplied_and_copied_is_random_and_every_time_the_same(dtype: str):
    kind = getattr(torch, dtype)
    copy_bytes = machine_speed.BLOCK + 4096
    state = torch.get_rng_state()
    left, right, source = machine_speed._data("cpu", kind, 64, 32, copy_bytes)
    assert torch.equal(torch.get_rng_state(), state)  # what else draws is left alone
    assert (left.shape, right.shape, source.shape) == ((64, 32), (32, 32), (copy_bytes,))
    assert left.dtype == right.dtype == kind
    for factor in (left, right):
        assert factor.unique().numel() > 0.5 * factor.numel()
        assert 0.9 < float(factor.double().std()) < 1.1
    assert torch.bincount(source.int(), minlength=256).min() > 0.9 * copy_bytes / 256
    again = machine_speed._data("cpu", kind, 64, 32, copy_bytes)
    assert all(torch.equal(one, other) for one, other in zip((left, right, source), again, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_measures_something(dtype: str):
    found = measure("cpu", dtype, size=32, copy_bytes=4096)
    assert 0 < found.matmul_gflops < 1e7
    assert 0 < found.copy_gbps < 1e5


def test_drift_is_that_of_whichever_moved_more():
    base = MachineSpeed(100.0, 20.0)
    assert base.drift_pct(MachineSpeed(100.0, 20.0)) == 0
    assert base.drift_pct(MachineSpeed(98.0, 15.0)) == pytest.approx(-25.0)
    assert base.drift_pct(MachineSpeed(130.0, 15.0)) == pytest.approx(30.0)
