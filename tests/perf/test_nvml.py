"""NVML sampling against a made-up NVML: what is read, what voids a round, what is said where nothing can be
read."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from perf.measure import nvml
from perf.measure.nvml import Monitor, driver_version, slowdown


class NVMLError(Exception):
    pass


def fake_nvml(**functions: Any) -> types.ModuleType:
    """A pynvml whose GPU is "GPU-the-uuid"; a function that is not given fails as NVML does."""
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid

    def absent(handle: Any) -> Any:
        raise NVMLError("not supported")

    for name in ("CurrentClocksEventReasons", "TotalEnergyConsumption", "UtilizationRates"):
        setattr(module, f"nvmlDeviceGet{name}", functions.get(name, absent))
    module.nvmlSystemGetDriverVersion = functions.get("driver", lambda: "580.1")
    return module


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(uuid="the-uuid")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(nvml, "INTERVAL_S", 0.001)


def test_only_heat_and_power_supply_are_slowdowns():
    assert slowdown(0) is None
    # idle, clocks set by hand, power cap, sync boost, display
    assert slowdown(0x1 | 0x2 | 0x4 | 0x10 | 0x100) is None
    assert slowdown(0x8) == "hardware slowdown"
    assert slowdown(0x4 | 0x20 | 0x40) == "software thermal slowdown, hardware thermal slowdown"
    assert slowdown(0x80) == "hardware power brake"


def test_a_cpu_has_nothing_to_read_and_says_so():
    with Monitor("cpu") as monitor:
        pass
    assert monitor.reading == nvml.GpuReading(reason="cpu is no NVIDIA GPU")


@pytest.mark.usefixtures("on_cuda")
def test_a_round_has_its_mean_utilisation_its_energy_and_any_slowdown_in_it(monkeypatch: pytest.MonkeyPatch):
    energies, bits, seen = iter([5000, 7500]), iter([0, 0x4, 0x44]), iter([40, 80])
    sampled = nvml.threading.Event()

    def rates(handle: str) -> Any:
        assert handle == "GPU-the-uuid"
        value = next(seen, None)
        if value is None:
            sampled.set()
            raise NVMLError("enough")
        return types.SimpleNamespace(gpu=value)

    library = fake_nvml(
        CurrentClocksEventReasons=lambda handle: next(bits, 0),
        TotalEnergyConsumption=lambda handle: next(energies),
        UtilizationRates=rates,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with Monitor("cuda") as monitor:
        assert sampled.wait(10)
    assert monitor.reading == nvml.GpuReading(60.0, 2.5, "hardware thermal slowdown")


@pytest.mark.usefixtures("on_cuda")
def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    with Monitor("cuda") as monitor:
        pass
    assert monitor.reading == nvml.GpuReading()


@pytest.mark.usefixtures("on_cuda")
def test_without_nvml_there_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise NVMLError("no driver")

    library: Any = fake_nvml(driver=broken)
    library.nvmlInit = broken
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with Monitor("cuda") as monitor:
        pass
    assert monitor.reading.reason == "NVML: no driver"
    assert driver_version() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of None is an ImportError
    assert "dynamic-batch[gpu]" in str(Monitor("cuda").reading.reason)
    assert driver_version() is None
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert driver_version() == "580.1"
