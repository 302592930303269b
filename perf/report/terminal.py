"""Runs, comparisons and self-tests as tables for a terminal, drawn by rich.

What comes from a file is shown, never obeyed: no terminal code in a name has any effect, and no length fills
a screen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import IO, TYPE_CHECKING, Literal

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from perf.gate.comparison import Comparison, Outcome
from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run
from perf.gate.steps import Steps
from perf.report.figures import figures
from perf.report.steps import HEADING, RIGHT as STEPS_RIGHT, rows, says
from perf.report.text import clean, middle, width
from perf.report.verdicts import COLUMNS, RIGHT, brief, day, headline, parts, sides, title

if TYPE_CHECKING:
    from perf.ab.selftest import Report

COLOURS = {Outcome.FAIL: "red", Outcome.ERROR: "red", Outcome.INCONCLUSIVE: "yellow", Outcome.PASS: "green"}
NAME_SHARE = 3 / 8  # of the terminal's width, at most, is for test ids
NAME_LENGTH = 20  # cells, which they have in any case
CELL_LENGTH = 1000  # of the terminal's cells, for any other cell
MOST_STEPS = 20  # that are shown


@dataclass(frozen=True)
class Fitted:
    """Something to draw that is made for the width it gets."""

    make: Callable[[int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.make(options.max_width)


def name_length(room: int) -> int:
    """The cells that test ids and the like may have in a terminal of this width."""
    return max(NAME_LENGTH, int(room * NAME_SHARE))


def show(what: RenderableType, width: int, file: IO[str] | None = None) -> None:
    """Print on standard output, as wide as the terminal, or `width` columns where there is none.

    Args:
        file: what stands for standard output, if something does.
    """
    Console(width=None if sys.stdout.isatty() else width, file=file).print(what)


def drawn(what: RenderableType, width: int) -> list[str]:
    """The lines of text, without colours, that rich makes of it."""
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as found:
        console.print(what)
    return [line.rstrip() for line in found.get().splitlines()]


def table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], room: int, name: str = ""
) -> Table:
    """Rows under their heading, at most `room` cells wide; columns named in `right` are set to the right."""
    cells = [[middle(clean(cell), CELL_LENGTH) for cell in row] for row in rows]
    widths = _widths([heading, *cells], room)
    found = Table(title=Text(clean(name)) if name else None, title_justify="left", box=SIMPLE)
    found.padding = (0, int(any(widths)), 0, 0)
    for at, column in enumerate(heading):
        side: Literal["left", "right"] = "right" if column in right else "left"
        found.add_column(Text(column), justify=side, width=widths[at], no_wrap=not at, overflow="fold")
    for row in cells:
        found.add_row(*map(Text, row))
    return found


def _widths(cells: Sequence[Sequence[str]], room: int) -> list[int | None]:
    """Widths of columns such that the first does not wrap and no word is broken, or None without room."""
    columns = list(zip(*cells, strict=True))
    whole = [max(map(width, column)) for column in columns]
    words = [max(width(word) for text in column for word in text.split() or [""]) for column in columns]
    found = [whole[0], *(min(most, room // 5) for most in words[1:])]  # but for a word like a sentence
    spare = room - sum(found) - 2 * len(found) - 1  # two cells between columns, one beside them
    if spare < 0:
        return [None] * len(found)
    kept = min(whole[-1] - found[-1], room // 4)  # for the last one, which may be a sentence
    for at, least in enumerate(found[:-1]):
        if whole[at] - least <= spare - kept:
            spare -= whole[at] - least
            found[at] = whole[at]
    return [*found[:-1], min(whole[-1], found[-1] + spare)]


def runs_table(runs: Sequence[Run], left_out: Sequence[str] = ()) -> RenderableType:
    """The last run's benchmarks and their main figures, and what of the runs could not be read."""

    def make(room: int) -> RenderableType:
        heading, *rows = figures(runs[-1], name_length(room))
        shown = table(heading, rows, heading[1:], room, f"{title(runs[-1])}, {day(runs[-1])}")
        return Group(shown, *_left_out(left_out, runs, room))

    return Fitted(make)


def comparison_table(comparison: Comparison, left_out: Sequence[str] = ()) -> RenderableType:
    """All that is not unchanged, then the notes, and the verdict last: a terminal is read from its end."""

    def make(room: int) -> RenderableType:
        shown = [part for part in parts(comparison, name_length(room)) if not part.folded]
        tables = [table(COLUMNS, part.rows, RIGHT, room, part.heading) for part in shown]
        runs = (comparison.base, comparison.head)
        notes = [Text(f"note: {clean(note)}") for note in brief(comparison.notes, runs, name_length(room))]
        pair = " -> ".join(sides(comparison))
        last = Text(f"{headline(comparison)}   {clean(pair)}", style=f"bold {COLOURS[comparison.outcome]}")
        return Group(*tables, *notes, *_left_out(left_out, runs, room), last)

    return Fitted(make)


def steps_table(steps: Steps) -> RenderableType:
    """The latest steps of the history, and what else there is in a line."""

    def make(room: int) -> RenderableType:
        found = rows(steps, name_length(room))
        shown = (
            [table(HEADING, found[:MOST_STEPS], STEPS_RIGHT, room, "Steps in the history")] if found else []
        )
        more = len(found) - MOST_STEPS
        last = f"{says(steps)}; {more} older ones are in the HTML page" if more > 0 else says(steps)
        return Group(*shown, Text(last))

    return Fitted(make)


def selftest_table(report: Report) -> RenderableType:
    """The share of runs in which each injected slowdown was called a regression, and metric by metric."""
    names = ["nothing" if rate.effect == "0" else rate.effect for rate in report.rates]
    runs = []
    for name, rate in zip(names, report.rates, strict=True):
        low, high = rate.bounds
        found = f"{rate.regressions} of {len(rate.outcomes)}"
        rest = (str(rate.outcomes.count(outcome)) for outcome in (Outcome.INCONCLUSIVE, Outcome.PASS))
        took = f"{median(rate.seconds):.0f} s, {max(rate.seconds):.0f} s"
        runs.append([name, found, f"{low:.0%} to {high:.0%}", *rest, str(rate.better), took])
    metrics = []
    for metric, sizes in report.visible.items():
        counts = (f"{rate.failed.get(metric, 0)} of {len(rate.outcomes)}" for rate in report.rates)
        seen = ("-" if size is None else f"{size:.1%}" for size in sizes)
        metrics.append([METRICS[metric].label if metric in METRICS else metric, *counts, *seen])
    counted = ("called a regression", "true rate, 95 % sure", "can't tell", "pass", "called better")
    first = ("injected", *counted, "median, longest run")
    second = ("metric", *names, *(f"sees in {minutes} min" for minutes in report.minutes))
    runs_of = f"A/B runs of at most {report.pairs} pairs of processes"
    each = "metric by metric: regressions called, and the slowdown that four runs in five would call one"
    return Fitted(
        lambda room: Group(
            table(first, runs, first, room, runs_of), table(second, metrics, second[1:], room, each)
        )
    )


def _left_out(lines: Sequence[str], runs: Sequence[Run], room: int) -> Iterator[Text]:
    for line in brief(lines, runs, name_length(room)):
        yield Text(f"left out: {clean(line)}", style="yellow")
