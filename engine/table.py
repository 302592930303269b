"""Tables that fit: of the columns that there are, those that matter most and have room.

Nothing is ever wrapped or cut: a column is shown whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.table import Table

GAP = 2  # between two columns


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, of one line or two, and a cell for each row.

    Args:
        unit: of its numbers, shown at the end of the heading.
        rank: 0 is always shown; of the others, those of higher rank make way first.
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
        """The heading with the unit, a line or two."""
        return f"{self.heading} {self.unit}".rstrip()

    @property
    def width(self) -> int:
        """How many cells of a terminal it takes."""
        return max(map(cell_len, [*self.head.split("\n"), *self.cells]))


def total_width(columns: Sequence[Column]) -> int:
    """Return how wide a table of these columns is."""
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that a table `width` wide has room for, in their order; those of rank 0 anyway."""
    shown = list(columns)
    while total_width(shown) > width and (last := max(shown, key=lambda column: column.rank)).rank:
        shown.remove(last)
    return shown


def drawn(columns: Sequence[Column]) -> Table:
    """Return a table of these columns, for a console that is as wide as they are."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for column in columns:
        table.add_column(
            column.head, justify="left" if column.is_text else "right", vertical="bottom", no_wrap=True
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table
