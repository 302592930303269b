"""A slowdown injected from outside, to test the gate: nothing in the engine knows of it. A leaf."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine import Engine, InputError


@contextmanager
def inject_slowdown(fraction: float) -> Iterator[None]:
    """Stretch every `Engine.step` of this process to 1 + `fraction` times its length, by spinning.

    The model's part is stretched before its tokens are published, so that every latency sees it, whether the
    runner computes a step when it is launched or lets its tokens come later. Only engines of this package
    slow down; other backends do not.

    Raises:
        InputError: for a negative fraction.
    """
    if fraction < 0:
        raise InputError(f"inject_slowdown={fraction} must be 0 or more: it slows down by this fraction")
    original = Engine.step
    if fraction:
        Engine.step = _slowed(original, fraction)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.step = original  # type: ignore[method-assign]


def _slowed(original: Any, fraction: float) -> Any:
    """Return `Engine.step`, longer by this fraction."""
    spinner = _Spinner(fraction)  # of all steps: one may read the tokens of the step before

    def step(self: Any) -> Any:
        spinner.begin()
        launch = self.runner.launch
        self.runner.launch = lambda batch: _SlowedTicket(launch(batch), spinner)
        try:
            chunks = original(self)
        finally:
            del self.runner.launch  # the class's own is found again
        spinner.spin()
        return chunks

    return step


class _Spinner:
    """Waits for a fraction of the time since it last did, busy as slow code would be."""

    def __init__(self, fraction: float) -> None:
        self.fraction, self.since = fraction, 0.0

    def begin(self) -> None:
        self.since = time.perf_counter()

    def spin(self) -> None:
        now = time.perf_counter()
        until = now + self.fraction * (now - self.since)
        while now < until:
            now = time.perf_counter()
        self.since = now


class _SlowedTicket:
    """A launched step whose tokens reach the host later."""

    def __init__(self, ticket: Any, spinner: _Spinner) -> None:
        self.ticket, self.spinner = ticket, spinner

    @property
    def is_async(self) -> bool:
        return bool(self.ticket.is_async)

    def collect(self) -> Any:
        result = self.ticket.collect()
        self.spinner.spin()
        return result
