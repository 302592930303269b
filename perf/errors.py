"""Ends of the gate: its exit codes, and the error that carries one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from engine import InputError


class Exit(IntEnum):
    """Exit codes of the gate. When several hold, the first of 2, 1, 3, 4, 0 is given: a regression outranks
    all else that a comparison can find, and what could not be compared outranks what could not be decided."""

    PASS = 0
    REGRESSION = 1
    USAGE = 2
    NOT_COMPARABLE = 3
    INCONCLUSIVE = 4


class GateError(InputError):
    """The comparison cannot be made. `code` is the exit code: 2 for a command to mend, 3 for absent data."""

    def __init__(self, message: str, code: Exit = Exit.NOT_COMPARABLE) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that what was begun is ended and put away."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM: what puts things away must not be left half done."""
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
