"""Runs and comparisons as text: tables for a terminal, a frame for pandas.

What comes from a file is shown, never obeyed: no terminal code in a name has any effect, and no length fills
a screen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run
from perf.gate.verdict import Comparison, Outcome
from perf.report.markup import clean, middle
from perf.report.verdicts import COLUMNS, RIGHT, brief, day, headline, named, parts, shorten, title, value

if TYPE_CHECKING:
    import pandas as pd

TIMED = ("tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "latency_p95_ms", "goodput")
FIGURES = (
    *TIMED,
    "decode_bandwidth_pct",
    "prefill_mfu_pct",
    "startup_s",
    "round_s",
    "forward_passes",
    "padded_tokens",
)
COLOURS = {Outcome.FAIL: "red", Outcome.ERROR: "red", Outcome.INCONCLUSIVE: "yellow", Outcome.PASS: "green"}
NAME_SHARE = 3 / 8  # of the terminal's width, at most, is for test ids
NAME_LENGTH = 20  # cells, which they have in any case
CELL_LENGTH = 1000  # of the terminal's cells, for any other cell


def figures(run: Run, name_length: int | None = None) -> list[list[str]]:
    """A row a benchmark with its main figures, the heading first; figures that no benchmark has are left
    out."""
    short, metrics = shorten(run.benchmarks, name_length), [METRICS[name] for name in FIGURES]
    grid = {
        name: [metric.format(value(b, metric.name)) for metric in metrics]
        for name, b in run.benchmarks.items()
    }
    kept = [i for i in range(len(metrics)) if any(cells[i] != "-" for cells in grid.values())]
    rows = [[short[name], *(cells[i] for i in kept)] for name, cells in grid.items()]
    return [["benchmark", *(named(metrics[i]) for i in kept)], *rows]


def runs_table(runs: Sequence[Run], left_out: Sequence[str] = ()) -> RenderableType:
    """The last run's benchmarks and their main figures, and what of the runs could not be read."""

    def make(name_length: int) -> RenderableType:
        heading, *rows = figures(runs[-1], name_length)
        table = _table(heading, rows, heading[1:], f"{title(runs[-1])}, {day(runs[-1])}")
        return Group(table, *_left_out(left_out, runs, name_length))

    return _Fitted(make)


def comparison_table(comparison: Comparison, left_out: Sequence[str] = ()) -> RenderableType:
    """All that is not unchanged, then the notes, and the verdict last: a terminal is read from its end."""

    def make(name_length: int) -> RenderableType:
        shown = [part for part in parts(comparison, name_length) if not part.folded]
        tables = [_table(COLUMNS, part.rows, RIGHT, part.heading) for part in shown]
        runs = (comparison.base, comparison.head)
        notes = [Text(f"note: {clean(note)}") for note in brief(comparison.notes, runs, name_length)]
        pair = f"{title(comparison.base)} -> {title(comparison.head)}"
        last = Text(f"{headline(comparison)}   {clean(pair)}", style=f"bold {COLOURS[comparison.outcome]}")
        return Group(*tables, *notes, *_left_out(left_out, runs, name_length), last)

    return _Fitted(make)


@dataclass(frozen=True)
class _Fitted:
    """What is made for the width it gets, by how long test ids may then be."""

    make: Callable[[int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.make(max(NAME_LENGTH, int(options.max_width * NAME_SHARE)))


def _left_out(lines: Sequence[str], runs: Sequence[Run], name_length: int) -> list[Text]:
    return [Text(f"left out: {clean(line)}", style="yellow") for line in brief(lines, runs, name_length)]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], name: str) -> Table:
    table = Table(title=Text(clean(name)), title_justify="left", box=SIMPLE)
    for i, column in enumerate(heading):
        table.add_column(
            Text(column), justify="right" if column in right else "left", overflow="fold", no_wrap=not i
        )
    for row in rows:
        table.add_row(*(Text(middle(clean(cell), CELL_LENGTH)) for cell in row))
    return table


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run and benchmark: where it comes from, our record, `fingerprint.*`, `rounds.*`, each a JSON
    list of one value a round, and `extra_info.*`, what others noted there."""
    import pandas as pd

    rows = []
    for run in runs:
        source = {"run": run.name, "commit": run.commit.get("id"), "datetime": run.datetime}
        for name, b in run.benchmarks.items():
            prints = {f"fingerprint.{key}": value for key, value in b.fingerprint.items()}
            rounds = {f"rounds.{key}": json.dumps(values) for key, values in b.rounds.items()}
            notes = {f"extra_info.{key}": value for key, value in b.notes.items()}
            measured = {**b.info, **prints, **rounds, **notes}
            rows.append({**source, "benchmark": name, "group": b.group, **measured})
    return pd.DataFrame(rows)
