"""The report as one HTML page: no script, no network, light or dark as the reader's system is, readable on a
phone.

It gathers what page.html.j2 lays out, charts.html.j2 draws and page.css colours; templates escape whatever
they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from perf.gate.comparison import Comparison, Outcome
from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run
from perf.gate.steps import NO_STEPS, Steps
from perf.report import charts
from perf.report.figures import figures, filled, history, sections
from perf.report.steps import HEADING, commands, rows, says
from perf.report.text import clean, middle, number, signed
from perf.report.verdicts import COLUMNS, day, headline, named, parts, shorten, sides, title, value

CLASSES = {Outcome.FAIL: "bad", Outcome.ERROR: "bad", Outcome.INCONCLUSIVE: "unsure", Outcome.PASS: "good"}
PRINTS = ("gpu", "cpu", "threads", "dtype", "torch", "transformers", "triton", "cuda", "driver", "python")


def page(
    runs: Sequence[Run],
    comparison: Comparison | None = None,
    left_out: Sequence[str] = (),
    steps: Steps = NO_STEPS,
) -> str:
    """The page for runs oldest first: what could not be read, the verdict, the last run's charts, history."""
    head = runs[-1]
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            head=head,
            left_out=left_out,
            comparison=comparison,
            css=CLASSES[comparison.outcome] if comparison else "",
            columns=COLUMNS,
            sections=sections(head, comparison.base if comparison else None),
            history=_history(runs),
            steps=_steps(steps),
            figures=figures(head),
            runs=_runs(runs),
        )
    )


@cache
def templates() -> Environment:
    """The templates beside this file; all that they show is cleaned, then escaped."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda shown: (
            shown if hasattr(shown, "__html__") else clean(shown)
        ),  # all but what macros made
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"clean": clean, "middle": middle, "number": number, "path": _path}
    found.globals |= {"title": title, "day": day, "headline": headline, "parts": parts, "sides": sides}
    found.globals |= {"charts": charts}
    return found


def _path(points: charts.Points) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _history(runs: Sequence[Run]) -> dict[str, Any]:
    """Rows of tables: of each benchmark first what gates it, then what else of it has a past."""
    series, left_out = history(runs)
    short = shorten(runs[-1].benchmarks)
    gating: dict[str, list[Any]] = {}
    others = []
    for benchmark, name, values in series:
        metric = METRICS[name]
        first, last = metric.format(values[0]), metric.format(values[-1])
        trend = values, f"{metric.label} over {len(values)} runs: {first} to {last}"
        change = signed(values[-1] / values[0] - 1) if values[0] else "-"
        row = [short[benchmark.fullname], named(metric), trend, first, last, change]
        if gating.setdefault(benchmark.fullname, row) is not row:
            others.append(row)
    says = f"{len(runs)} runs, from {day(runs[0])} to {day(runs[-1])}; what gates each benchmark first."
    if left_out:
        says += f" {left_out} earlier results are left out: another fingerprint "
        says += "(machine, driver, library or model) or other work."
    heading = ("benchmark", "metric", "trend", "first", "last", "change")
    return {"says": says, "heading": heading, "gating": list(gating.values()), "others": others}


def _steps(steps: Steps) -> dict[str, Any]:
    """What there is to say of steps: a sentence, rows of a table, commands."""
    found = {"says": says(steps), "heading": HEADING, "rows": rows(steps), "commands": commands(steps)}
    return found if steps.searched else {}


def _runs(runs: Sequence[Run]) -> list[list[str]]:
    """A heading, then where and when each run was measured, newest first, with all values that it has."""
    rows = [["run", "measured", *PRINTS, "rounds voided"]]
    for run in reversed(runs):
        some = run.benchmarks.values()
        found = (dict.fromkeys(v for b in some if (v := b.fingerprint.get(key))) for key in PRINTS)
        voided = sum(value(b, "rounds_voided") or 0.0 for b in some)
        rows.append([title(run), day(run), *(", ".join(each) or "-" for each in found), number(voided)])
    return filled(rows)
