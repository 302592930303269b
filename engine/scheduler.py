"""Which tokens are computed next. Pure Python, no torch.

A request is its tokens and how many of them are computed; a step is a list of `(request, n)`: compute the next n
tokens of that request. Prefill, decode and recomputation are all the same act, so nothing here knows a phase.
Policies differ only in when a waiting request is admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from engine.request import Request

Step = list[tuple[Request, int]]


class Memory(Protocol):
    """The KV accounting a scheduler admits against."""

    def check(self, request: Request) -> None: ...
    def reserve(self, request: Request) -> bool: ...
    def release(self, request: Request) -> None: ...


class Scheduler:
    """Plans steps for the requests it holds, first come first served.

    Args:
        policy: "sequential" admits one request when none runs; "dynamic" fills a batch when none runs.
        max_batch_size: requests that run together at most.
        memory: the KV accounting; a request that does not fit now waits, and everyone behind it too.
    """

    def __init__(self, policy: str, max_batch_size: int, memory: Memory) -> None:
        self.max_running = 1 if policy == "sequential" else max_batch_size
        self.memory = memory
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether any request still waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request that has passed `memory.check`."""
        self.waiting.append(request)

    def plan(self, now: float) -> Step:
        """The next step; `now` (seconds) becomes the `scheduled` time of requests it admits. Empty without work."""
        if not self.running:
            while self.waiting and len(self.running) < self.max_running and self.memory.reserve(self.waiting[0]):
                request = self.waiting.popleft()
                request.scheduled = now if request.scheduled is None else request.scheduled
                self.running.append(request)
        return [(request, len(request.tokens) - request.computed) for request in self.running]

    def commit(self, step: Step, tokens: Sequence[int | None], now: float) -> None:
        """Advance the computed counts and hand each request its next token, which reached the host at `now` seconds.

        `tokens` has one entry a request of the step, None where it has no token. A request that ended since the plan
        is passed over; one that ends by this token has its `finish_reason` set, and is let go by `release`.
        """
        for (request, count), token in zip(step, tokens, strict=True):
            if request.finish_reason is None:
                request.computed += count
                if token is not None:
                    request.append(token, now)

    def release(self, request: Request) -> None:
        """Let a request go, wherever it is: its place and its memory are free for the next plan."""
        if request in self.running:
            self.running.remove(request)
            self.memory.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
