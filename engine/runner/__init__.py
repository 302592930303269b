"""From a step to next tokens. Runners differ only in how they hold keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from engine.step import Done, StepResult, Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.kv_pool import PagePool
    from engine.scheduler import Step


class Runner(ABC):
    """From steps to tokens; a runner that need not wait for them launches in its own way.

    `copied_bytes` are the model's weights that it holds a second time, in another order.
    """

    copied_bytes: int = 0

    @abstractmethod
    def run(self, step: Step) -> StepResult:
        """Compute a step."""

    def launch(self, step: Step) -> Ticket:
        """Start a step."""
        return Done(self.run(step))


def make_runner(
    model: PreTrainedModel, pool: PagePool, deterministic: bool, rows: int, int8: bool = False
) -> Runner:
    """The packed runner for the model's device; `rows` requests share a step at most; int8 is for a CPU.

    Raises:
        InputError: for a model that cannot run packed.
    """
    from engine.runner.packed import PackedRunner

    if model.device.type == "cuda" and model.dtype.itemsize <= 4:  # no kernel computes in float64
        from engine.runner.cuda import CudaRunner

        return CudaRunner(model, pool, deterministic, rows)
    return PackedRunner(model, pool, deterministic, int8)
