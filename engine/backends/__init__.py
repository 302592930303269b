"""Ways to compute a batch over pages of keys and values: each a room of its own, and none imports another."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from engine.errors import InputError
from engine.sampling import sample
from engine.step import Batch, Choice, Done, Ticket


class Backend(ABC):
    """A model, made ready to compute batches, and its keys and values in pages."""

    @property
    def copied_bytes(self) -> int:
        """Bytes of the model's weights that it holds a second time, in another order."""
        return 0

    @property
    @abstractmethod
    def page_bytes(self) -> int:
        """Bytes of one page in all layers, once there are pages."""

    @abstractmethod
    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, all zero; what there was is lost."""

    @abstractmethod
    def clear(self, pages: list[int]) -> None:
        """Make pages zero again: those that may hold NaN, which no mask hides from a sum."""

    def quantize(self) -> None:
        """Turn the weights of products into int8.

        Raises:
            InputError: for a backend that has no int8.
        """
        raise InputError(f"{type(self).__name__} has no int8")

    @abstractmethod
    def logits(self, batch: Batch) -> torch.Tensor:
        """Write a batch's keys and values into their pages; return the logits [R, V] of its wanted tokens."""

    def launch(self, batch: Batch) -> Ticket[list[Choice]]:
        """Start a batch; the ticket gives the next tokens of its `requests`, R."""
        logits_RV = self.logits(batch)
        return Done(sample(logits_RV, batch.requests) if batch.requests else [])
