"""Who may hold KV memory: the accounting behind admission. Pure Python: it moves no data and knows no tensor."""

from __future__ import annotations

from engine.errors import InputError
from engine.request import Request


class RowPool:
    """Accounts for the padded runner's rectangle: as many rows as requests, as many columns as the widest needs.

    Rows are left-padded to the longest prompt and share their columns, so a batch needs
    `rows x (longest prompt + longest output)` positions, known before it starts.

    Args:
        capacity: positions (tokens of one request) that fit in KV memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: dict[str, Request] = {}

    def check(self, request: Request) -> None:
        """Raise InputError if this request could not run even alone."""
        if request.max_len > self.capacity:
            raise InputError(
                f"request {request.id}: a prompt of {request.prompt_len} tokens and max_new_tokens="
                f"{request.params.max_new_tokens} need {request.max_len} positions of KV memory; it holds "
                f"{self.capacity}: raise kv_memory or ask for less"
            )

    def reserve(self, request: Request) -> bool:
        """Take a row for `request` if the batch still fits with it; True if it was taken."""
        batch = [*self._held.values(), request]
        width = max(r.prompt_len for r in batch) + max(r.params.max_new_tokens for r in batch)
        if len(batch) * width > self.capacity:
            return False
        self._held[request.id] = request
        return True

    def release(self, request: Request) -> None:
        """Give the row back."""
        del self._held[request.id]
