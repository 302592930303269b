"""A slowdown injected from outside, to test the gate: nothing in the engine knows of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine import Engine
from perf.measure.slowdown import Slowdown


@contextmanager
def inject_slowdown(spec: float | str) -> Iterator[None]:
    """Stretch steps of `Engine.step` in this process to 1 + a fraction of their length, by spinning.

    The model's part is stretched before its tokens are published, so that every latency sees it, whether the
    runner computes a step when it is launched or lets its tokens come later. Only engines of this package
    slow down; other backends do not. It can be entered and left between rounds; each time the count of
    `FRACTION@N` begins anew.

    Args:
        spec: how much, and which steps. `0.05`: every step 5 % longer. `0.2@chunks`: 20 %, but only steps in
            which a chunk of some prompt is computed, so that decoding alone keeps its pace. `1.5@10`: every
            tenth step that is launched, two and a half times its length.

    Raises:
        InputError: for anything else.
    """
    slowdown = Slowdown.parse(spec)
    original = Engine.step
    if slowdown.fraction:
        Engine.step = _slowed(original, slowdown)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.step = original  # type: ignore[method-assign]


def _slowed(original: Any, slowdown: Slowdown) -> Any:
    """Return `Engine.step` with those steps longer that are meant."""
    spinner = _Spinner(slowdown)  # of all steps: one may read the tokens of the step before

    def step(self: Any) -> Any:
        spinner.begin()
        launch = self.runner.launch

        def launch_slowed(batch: Any) -> _SlowedTicket:
            fraction = spinner.fraction_of(batch)
            return _SlowedTicket(launch(batch), fraction, spinner)

        self.runner.launch = launch_slowed
        try:
            chunks = original(self)
        finally:
            del self.runner.launch  # the class's own is found again
        spinner.end()
        return chunks

    return step


def has_chunk(batch: Any) -> bool:
    """Return whether a step computes a chunk of some prompt: more than one token, or one that is not the last
    that its request knows, so that no logits are wanted of it yet.

    Args:
        batch: pairs of a request and how many of its tokens are computed, as a runner launches them.
    """
    return any(
        count > 1 or request.computed + count < len(request.tokens) + request.pending
        for request, count in batch
    )


class _Spinner:
    """Waits for a fraction of the time since it last did, busy as slow code would be.

    What a call of `Engine.step` does after the tokens of a step were read is of that step; where none were
    read, of the one that was launched.
    """

    def __init__(self, slowdown: Slowdown) -> None:
        self.slowdown, self.since, self.launched = slowdown, 0.0, 0
        self.read: float | None = None
        self.last: float | None = None

    def begin(self) -> None:
        self.read = self.last = None
        self.since = time.perf_counter()

    def fraction_of(self, batch: Any) -> float:
        """Return by which fraction a step that is about to be launched is to be stretched."""
        self.launched += 1
        meant = self.launched % self.slowdown.every == 0
        if self.slowdown.chunks:
            meant = has_chunk(batch)
        self.last = self.slowdown.fraction if meant else 0.0
        return self.last

    def collected(self, fraction: float) -> None:
        """Stretch what it took to have the tokens of a step."""
        self.read = fraction
        self._spin(fraction)

    def end(self) -> None:
        """Stretch what the call did since."""
        whole = self.slowdown.every == 1 and not self.slowdown.chunks
        found = self.last if self.read is None else self.read
        self._spin(found if found is not None else self.slowdown.fraction if whole else 0.0)

    def _spin(self, fraction: float) -> None:
        now = time.perf_counter()
        until = now + fraction * (now - self.since)
        while now < until:
            now = time.perf_counter()
        self.since = now


class _SlowedTicket:
    """A launched step whose tokens reach the host later."""

    def __init__(self, ticket: Any, fraction: float, spinner: _Spinner) -> None:
        self.ticket, self.fraction, self.spinner = ticket, fraction, spinner

    @property
    def is_async(self) -> bool:
        return bool(self.ticket.is_async)

    def collect(self) -> Any:
        result = self.ticket.collect()
        self.spinner.collected(self.fraction)
        return result
