"""What commands write and how they end: standard output that takes no more or not every character, Ctrl-C.

Exit codes: 0 done, 1 a fault of the program itself (with a traceback), 2 what the user can mend (one line
says how), 130 interrupted, 141 nobody reads the output any more (as a shell says of what SIGPIPE ended).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console, RenderableType

USAGE, INTERRUPTED, NO_READER = 2, 130, 141
ERRORS = Console(stderr=True)


class Output:
    """Standard output. Characters that its encoding lacks are escaped, as Python does on standard error."""

    def __init__(self) -> None:
        self._escaped = False

    def write(self, text: str, end: str = "\n") -> None:
        """Write text at once.

        Raises:
            BrokenPipeError: if nobody reads it any more.
        """
        if sys.stdout is None:  # closed from the beginning
            return
        try:
            sys.stdout.write(text + end)
        except UnicodeEncodeError as error:
            sys.stdout.write((text + end).encode(error.encoding, "backslashreplace").decode(error.encoding))
            self._escaped = True
        sys.stdout.flush()

    def show(self, table: RenderableType, width: int) -> None:
        """Write what rich can draw, `width` columns wide where there is no terminal."""
        console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else width)
        with console.capture() as drawn:
            console.print(table)
        self.write(drawn.get(), end="")

    def close(self) -> None:
        """Say on standard error whether anything was escaped."""
        if self._escaped:
            encoding = sys.stdout.encoding
            line = f"escaped what {encoding} lacks: set PYTHONIOENCODING=utf-8 to see it"
            ERRORS.print(line, highlight=False, soft_wrap=True)


@contextmanager
def ending() -> Iterator[None]:
    """End a command, without a traceback, on Ctrl-C or when nobody reads what it writes."""
    try:
        yield
    except KeyboardInterrupt:
        ERRORS.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or the interpreter would complain of what it cannot flush
        raise typer.Exit(NO_READER) from None


def fail(error: Exception) -> None:
    """End the program with an error that the user can mend, in one line."""
    ERRORS.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(USAGE)
