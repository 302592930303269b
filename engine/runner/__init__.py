"""From a step to next tokens. Runners differ only in how they hold keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.request import Choice
    from engine.scheduler import Step


@dataclass(frozen=True, slots=True)
class StepResult:
    """What running a step gave and what it cost.

    `choices` has one entry a request of the step, in its order: None where more of its tokens must be
    computed first. `tokens_computed` counts useful positions, `padded_tokens` the others. `model_s` is the
    time from handing tensors to the model to holding the sampled tokens on the host (seconds), `kv_bytes` the
    KV memory that requests hold.
    """

    choices: list[Choice | None]
    forward_passes: int
    tokens_computed: int
    padded_tokens: int
    model_s: float
    kv_bytes: int


class Ticket(Protocol):
    """A step that has been launched; if `late`, the next may be launched before `collect`, which waits for
    this one."""

    @property
    def late(self) -> bool: ...

    def collect(self) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class Done:
    """The ticket of a step that is computed already."""

    result: StepResult
    late: bool = False

    def collect(self) -> StepResult:
        """The result, at once."""
        return self.result


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
