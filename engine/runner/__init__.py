"""From a step to next tokens. Runners differ in how they hold keys and values: in pages, or in a
rectangle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from engine.step import StepResult, Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.config import EngineConfig
    from engine.kv_pool import PagePool, RowPool
    from engine.scheduler import Step


class Runner(ABC):
    """Computes steps.

    `memory` is the accounting of its keys and values, for the scheduler; `copied_bytes` are the model's
    weights that it holds a second time, in another order.
    """

    memory: PagePool | RowPool
    copied_bytes: int = 0

    @abstractmethod
    def launch(self, step: Step) -> Ticket[StepResult]:
        """Start a step. Where its ticket is async, the next may be launched before this one's is
        collected."""


def make_runner(model: PreTrainedModel, config: EngineConfig, memory: int, token_bytes: int) -> Runner:
    """Return the runner of a resolved config, proven to give the model's own logits.

    Args:
        memory: bytes for keys and values.
        token_bytes: of a token's keys and values in the model's own cache.

    Raises:
        InputError: for a model that cannot run so, or memory for less than one page.
    """
    if config.runner == "padded":
        from engine.kv_pool import RowPool
        from engine.runner.padded import PaddedRunner

        assert config.max_step_tokens is not None
        return PaddedRunner(model, config.max_step_tokens, RowPool(memory // token_bytes))
    from engine.runner.packed import make_packed_runner

    return make_packed_runner(model, config, memory)
