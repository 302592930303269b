"""Runs and comparisons as text: tables for a terminal, Markdown for a CI's summary, a frame for pandas.

What comes from a file is shown, never obeyed: no Markdown, mention, link or terminal code in a name has any effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from perf.gate import Comparison, Outcome
from perf.metrics import METRICS
from perf.report.markup import clean
from perf.report.verdicts import COLUMNS, RIGHT, day, headline, named, parts, shorten, title, value
from perf.runs import Run

if TYPE_CHECKING:
    import pandas as pd

TIMED = ("tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "latency_p95_ms", "goodput")
FIGURES = (*TIMED, "decode_bandwidth_pct", "prefill_mfu_pct", "startup_s", "round_s", "forward_passes", "padded_tokens")
COLOURS = {Outcome.FAIL: "red", Outcome.ERROR: "red", Outcome.INCONCLUSIVE: "yellow", Outcome.PASS: "green"}
MARKS = {Outcome.FAIL: "❌", Outcome.ERROR: "❌", Outcome.INCONCLUSIVE: "❔", Outcome.PASS: "✅"}


def figures(run: Run) -> list[list[str]]:
    """A row a benchmark with its main figures, the heading first; figures that no benchmark has are left out."""
    short, metrics = shorten(run.benchmarks), [METRICS[name] for name in FIGURES]
    grid = {name: [metric.format(value(b, metric.name)) for metric in metrics] for name, b in run.benchmarks.items()}
    kept = [i for i in range(len(metrics)) if any(cells[i] != "-" for cells in grid.values())]
    rows = [[short[name], *(cells[i] for i in kept)] for name, cells in grid.items()]
    return [["benchmark", *(named(metrics[i]) for i in kept)], *rows]


def runs_table(runs: Sequence[Run]) -> RenderableType:
    """The last run's benchmarks and their main figures."""
    heading, *rows = figures(runs[-1])
    return _table(heading, rows, heading[1:], f"{title(runs[-1])}, {day(runs[-1])}")


def comparison_table(comparison: Comparison) -> RenderableType:
    """All that is not unchanged, then the notes, and the verdict last: a terminal is read from its end."""
    tables = [_table(COLUMNS, part.rows, RIGHT, part.heading) for part in parts(comparison) if not part.folded]
    notes = [Text(f"note: {clean(note)}") for note in comparison.notes]
    pair = f"{title(comparison.base)} -> {title(comparison.head)}"
    last = Text(f"{headline(comparison)}   {clean(pair)}", style=f"bold {COLOURS[comparison.outcome]}")
    return Group(*tables, *notes, last)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], name: str) -> Table:
    table = Table(title=Text(clean(name)), title_justify="left", box=SIMPLE)
    for i, column in enumerate(heading):
        table.add_column(Text(column), justify="right" if column in right else "left", overflow="fold", no_wrap=not i)
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
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


def markdown(runs: Sequence[Run], comparison: Comparison | None = None) -> str:
    """For `$GITHUB_STEP_SUMMARY`: the verdict, what is worse, what can't be told, and all else folded away."""
    lines: list[str] = []
    if comparison is not None:
        lines += [f"## {MARKS[comparison.outcome]} {_prose(headline(comparison))}", ""]
        lines += [f"{_code(title(comparison.base))} → {_code(title(comparison.head))}", ""]
        for part in parts(comparison):
            name, grid = f"{part.heading} ({part.count})", _grid(COLUMNS, part.rows, RIGHT)
            lines += _fold(name, grid) if part.folded else [f"### {name}", "", *grid]
        lines += [*(f"- {_prose(note)}" for note in comparison.notes), ""]
    heading, *rows = figures(runs[-1])
    grid = _grid(heading, rows, heading[1:])
    name = f"All figures of {title(runs[-1])}"
    lines += [f"## {_prose(name)}", "", *grid] if comparison is None else _fold(name, grid)
    return "\n".join(lines).rstrip() + "\n"


def _fold(summary: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{_prose(summary)}</summary>", "", *lines, "</details>", ""]


def _grid(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> list[str]:
    rule = ["---:" if column in right else "---" for column in heading]
    cells = [[_code(row[0]), *map(_prose, row[1:])] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*map(_prose, heading)], rule, *cells)] + [""]


def _code(text: str) -> str:
    """Text from a file as inline code, in a table too."""
    return f"`{clean(text).replace('`', chr(39)).replace('|', chr(92) + '|') or ' '}`"


def _prose(text: str) -> str:
    """Text with every character that Markdown or HTML could take for its own written as an entity."""
    return re.sub(r"[^\w\s.,:;%+=()/'?…→-]", lambda found: f"&#{ord(found[0])};", clean(text)).replace("://", ":&#47;/")
