"""A batch whose tokens are still on the device, and how they become choices when the host reads them."""

from __future__ import annotations

from functools import lru_cache

import torch

from engine.step import NON_FINITE, Choice


class InFlight:
    """The ticket of a batch whose tokens are still on the device.

    Args:
        tokens_B: of every output row, on their way to the host; -1 for a row that is not finite. `done` says
            when.
        rows: the output row of each wanted token.
    """

    is_async = True

    def __init__(self, tokens_B: torch.Tensor, done: torch.cuda.Event | None, rows: list[int]) -> None:
        self._tokens_B, self._done, self._rows = tokens_B, done, rows

    def collect(self) -> list[Choice]:
        """Wait for the batch and return its tokens."""
        if self._done is not None:
            self._done.synchronize()
        tokens = self._tokens_B.tolist()
        return [_choice(tokens[row]) for row in self._rows]


@lru_cache(2**16)  # a token is chosen again and again, and making a Choice is dear
def _choice(token: int) -> Choice:
    return Choice(token) if token >= 0 else NON_FINITE
