"""What commands write and how they end: standard output that takes no more or not every character, Ctrl-C.

Exit codes: 0 done, 1 a fault of the program itself (with a traceback), 2 what the user can mend (one line
says how), 130 interrupted, 141 nobody reads the output any more (as a shell says of what SIGPIPE ended).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console

from engine.table import Column, drawn, fitting, total_width

USAGE, INTERRUPTED, NO_READER = 2, 130, 141
COLUMNS = 100  # where there is no terminal that says
ERRORS = Console(stderr=True)


def columns_of_terminal() -> int:
    """Return how many columns there are: $COLUMNS, else the terminal's own, else 100."""
    return shutil.get_terminal_size((COLUMNS, 24)).columns


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

    def show(
        self, columns: Sequence[Column], title: str, below: Sequence[str], way_out: str, whole: bool = False
    ) -> None:
        """Write a table, of the columns that there is room for.

        Args:
            title: the line above it, if it has one.
            below: sentences for below it.
            way_out: how to see the columns that had no room, said with their names if there are any.
            whole: every column, whatever room there is.
        """
        room = columns_of_terminal()
        shown = list(columns) if whole else fitting(columns, room)
        width = total_width(shown)
        console = Console(width=max(room, width))
        missing = ", ".join(column.name for column in columns if column not in shown)
        with console.capture() as lines:
            if title:
                console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
            console.print(drawn(shown), width=width)
            hint = [f"no room for {missing}: {way_out}"] if missing else []
            for line in (*hint, *below):
                console.print(line, markup=False, highlight=False, width=room)
        self.write("\n".join(line.rstrip() for line in lines.get().splitlines()))

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
