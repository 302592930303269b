"""GPU telemetry of one round, sampled by NVML: utilisation, energy, and reasons for a slowdown.

A thread of its own reads every 50 ms; the timed thread never waits for it. Without an NVIDIA GPU, or without
`nvidia-ml-py`, there is nothing to read, and that is said in `reason` rather than guessed at.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

INTERVAL_S = 0.05
# Clocks held down by heat or by the power supply: the round says nothing about the code. NVML's bits; the
# power cap (0x4) is left out, because a GPU under full load runs at it by design.
SLOWDOWNS = {0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
             0x80: "hardware power brake"}  # fmt: skip


@dataclass(frozen=True)
class GpuReading:
    """Mean utilisation (%) and energy (J) of one round, and why its clocks were held down, if they were.

    `reason` says why there is nothing to read. Utilisation is None for a round shorter than a sample.
    """

    util_pct: float | None = None
    energy_j: float | None = None
    slowdown: str | None = None
    reason: str | None = None


def slowdown(bits: int) -> str | None:
    """Return the slowdowns in NVML's mask of clock event reasons, in words; None if there is none."""
    return ", ".join(text for bit, text in SLOWDOWNS.items() if bits & bit) or None


class Monitor:
    """Context manager around a round, whose `reading` it has afterwards."""

    def __init__(self, device: str) -> None:
        self.reading = GpuReading(reason=f"{device} is no NVIDIA GPU")
        self._nvml: Any = None
        self._handle: Any = None
        if device.startswith("cuda"):
            self._open(device)

    def _open(self, device: str) -> None:
        try:
            import pynvml
        except ImportError:
            self.reading = GpuReading(
                reason="nvidia-ml-py is not installed: pip install 'dynamic-batch[gpu]'"
            )
            return
        import torch

        try:
            pynvml.nvmlInit()
            # CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's, so it is found by its UUID.
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(
                f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            )
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.reading = GpuReading(reason=f"NVML: {error}")

    def __enter__(self) -> Monitor:
        if self._nvml is not None:
            self._utilisation: list[float] = []
            self._bits = self._read("nvmlDeviceGetCurrentClocksEventReasons", 0)
            self._energy = self._read("nvmlDeviceGetTotalEnergyConsumption")
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, name="nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._nvml is None:
            return
        self._stop.set()
        self._thread.join()
        self._bits |= self._read("nvmlDeviceGetCurrentClocksEventReasons", 0)
        energy = self._read("nvmlDeviceGetTotalEnergyConsumption")
        busy = self._utilisation
        self.reading = GpuReading(
            util_pct=sum(busy) / len(busy) if busy else None,
            energy_j=None if energy is None or self._energy is None else (energy - self._energy) / 1e3,
            slowdown=slowdown(self._bits),
        )

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            rates = self._read("nvmlDeviceGetUtilizationRates")
            if rates is not None:
                self._utilisation.append(float(rates.gpu))
            self._bits |= self._read("nvmlDeviceGetCurrentClocksEventReasons", 0)

    def _read(self, function: str, default: Any = None) -> Any:
        """Return one value, or `default` where this GPU does not have it (a MIG slice has no utilisation)."""
        try:
            return getattr(self._nvml, function)(self._handle)
        except self._nvml.NVMLError:
            return default


def driver_version() -> str | None:
    """Return the NVIDIA driver's version; None where NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
