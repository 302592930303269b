"""Standard output and how a command ends: tables that fit, characters it lacks, a closed pipe, Ctrl-C.

Exit codes: 0 done, 1 a fault of the program itself (with a traceback), 2 what the user can mend (one line
says how), 130 interrupted, 141 nobody reads the output any more (as a shell says of what SIGPIPE ended).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table

USAGE, INTERRUPTED, NO_READER = 2, 130, 141
COLUMNS = 100  # of what is no terminal
GAP = 2  # between two columns of a table
ERRORS = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, which is shown whole or not at all: its heading, and a cell for each row.

    Args:
        heading: of one line or two.
        unit: of its numbers, shown at the end of the heading.
        rank: 0 is always shown; of the others, the highest rank goes first.
        is_text: begins at the left, as words do; numbers end at the right.
    """

    heading: str
    cells: Sequence[str]
    unit: str = ""
    rank: int = 0
    is_text: bool = False

    @property
    def name(self) -> str:
        """The heading on one line, without the unit."""
        return " ".join(self.heading.split())

    @property
    def head(self) -> str:
        """The heading with the unit."""
        return f"{self.heading} {self.unit}".rstrip()


def total_width(columns: Sequence[Column]) -> int:
    """Return how many cells of a terminal a table of these columns takes."""
    widths = [max(map(cell_len, [*column.head.split("\n"), *column.cells])) for column in columns]
    return sum(widths) + GAP * (len(columns) - 1)


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that a table `width` wide has room for, in their order; those of rank 0 anyway."""
    shown = list(columns)
    while total_width(shown) > width and (last := max(shown, key=lambda column: column.rank)).rank:
        shown.remove(last)
    return shown


class Output:
    """Standard output. Characters that its encoding lacks are escaped, as Python does on standard error."""

    def __init__(self) -> None:
        self._escaped = False

    def write(self, text: str, end: str = "\n") -> None:
        """Write text at once; raise BrokenPipeError if nobody reads it any more."""
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
        """Write a table of the columns that there is room for: $COLUMNS, else the terminal's, else 100.

        Args:
            title: the line above it; none if empty.
            below: sentences for below it.
            way_out: how to see the columns that had no room, said with their names if there are any.
            whole: every column, whatever room there is.
        """
        room = shutil.get_terminal_size((COLUMNS, 24)).columns
        shown = list(columns) if whole else fitting(columns, room)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for column in shown:
            side: JustifyMethod = "left" if column.is_text else "right"
            table.add_column(column.head, justify=side, vertical="bottom", no_wrap=True)
        for row in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*row)
        missing = ", ".join(column.name for column in columns if column not in shown)
        hint = [f"no room for {missing}: {way_out}"] if missing else []
        width = total_width(shown)
        console = Console(width=max(room, width))
        with console.capture() as lines:
            if title:
                console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
            console.print(table, width=width)
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
    """End the program with what the user can mend, in one line."""
    ERRORS.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(USAGE)
