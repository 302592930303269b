"""A step whose tokens are still on the device, and how they become choices when the host reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from engine.step import NON_FINITE, Choice, StepResult


class InFlight:
    """An in-flight step whose tokens are still on the device.

    Args:
        tokens_B: of every output row, on their way to the host; -1 for a row that is not finite. `done` says
            when.
        rows: the output row of each request of the step, None where more of its tokens must be computed
            first.
        result: everything else about the step.
    """

    is_async = True  # the next step may be launched before `collect`

    def __init__(
        self,
        tokens_B: torch.Tensor,
        done: torch.cuda.Event | None,
        rows: list[int | None],
        result: Callable[[list], StepResult],
    ) -> None:
        self._tokens_B, self._done, self._rows, self._result = tokens_B, done, rows, result

    def collect(self) -> StepResult:
        """Wait for the step and give its tokens."""
        if self._done is not None:
            self._done.synchronize()
        tokens = self._tokens_B.tolist()
        return self._result([None if row is None else _choice(tokens[row]) for row in self._rows])


@lru_cache(2**16)  # a token is chosen again and again, and making a Choice is dear
def _choice(token: int) -> Choice:
    return Choice(token) if token >= 0 else NON_FINITE
