"""State that the benchmarks of one pytest session share."""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch

from engine import EngineConfig, LoadedModel, load
from perf.backends import INT8
from perf.gate.entries import Flat
from perf.measure import machine_speed
from perf.measure.costs import ModelCosts, model_costs
from perf.measure.machine_speed import MachineSpeed
from perf.measure.slo import Slo
from perf.measure.token_check import Reference

MIN_TIME_S = 1.0


class Held(NamedTuple):
    """A model on its device, what its tokens are checked against, and what they cost at least."""

    loaded: LoadedModel
    reference: Reference
    costs: ModelCosts


class BenchSession:
    """Options of a session, and one model at a time with its reference.

    inject_slowdown: as perf/measure/inject_slowdown.py takes it. min_time: seconds to be timed on a CPU where
    nobody said how many rounds.
    """

    def __init__(
        self,
        *,
        model: str | None,
        dtype: str | None,
        rounds: int | None,
        quick: bool,
        inject_slowdown: float | str,
        min_time: float = MIN_TIME_S,
        slo: Slo | None = None,
    ) -> None:
        self.model, self.dtype, self.rounds, self.quick = model, dtype, rounds, quick
        self.inject_slowdown, self.min_time, self.slo = inject_slowdown, min_time, slo or Slo()
        self.recorded: list[Flat] = []
        self._speeds: dict[tuple[str, str], MachineSpeed] = {}
        self._key: tuple[str, str, str] | None = None
        self._held: Held | None = None

    def spec(self, device: str) -> str:
        """Return the model to run on a device: `--model`, else a small one on a CPU and the published 0.5B
        shape on CUDA."""
        return self.model or ("random:qwen2.5-0.5b" if device == "cuda" else "random:tiny-llama")

    def hold(self, device: str, spec: str | None = None) -> Held:
        """Return the model on its device; the one held before goes first, so that two never share memory."""
        dtype = self.dtype or ("float16" if device == "cuda" else "float32")
        rounded = dtype == INT8
        key = (spec or self.spec(device), device, "float32" if rounded else dtype)
        if self._held is None or key != self._key:
            self.drop()
            loaded = load(key[0], device=device, dtype=key[2])
            kv_item = EngineConfig(dtype=dtype).kv_itemsize
            costs = model_costs(loaded.model, 1 if rounded else None, kv_item)
            self._held, self._key = Held(loaded, Reference(loaded), costs), key
        return self._held

    def machine_speed(self, device: str) -> MachineSpeed:
        """Return the device's rates in the dtype of the model, which the roofline's percentages are of.

        They are measured once a session. Whatever model is held there stays: another beside it might find no
        room.
        """
        held = self._held if self._key is not None and self._key[1] == device else None
        loaded, _, _ = held or self.hold(device)
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        return self._speeds.get((device, dtype)) or self.measure_speed(device, dtype)

    def measure_speed(self, device: str, dtype: str) -> MachineSpeed:
        """Return a device's rates as they are now; the first of each dtype are the session's."""
        speed = machine_speed.measure(device, dtype)
        self._speeds.setdefault((device, dtype), speed)
        return speed

    def real(self, device: str) -> bool:
        """Return whether the model is worth a full workload: one that was asked for, or any on CUDA."""
        return self.model is not None or device == "cuda"

    def drop(self) -> None:
        """Forget the model."""
        self._held = self._key = None
        free()


def free() -> None:
    """Collect what is no longer used, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
