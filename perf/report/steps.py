"""Steps in the history as rows, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

from perf.gate.steps import LEAST, Step, Steps
from perf.report.text import signed
from perf.report.verdicts import named, shorten

HEADING = ("benchmark", "metric", "before", "after", "change", "", "commits", "since")
RIGHT = ("before", "after", "change")


def says(steps: Steps) -> str:
    """What was looked for and how much was found, in a sentence; empty where no series is long enough."""
    if not steps.searched:
        return ""
    where = f"in {steps.searched} series of {2 * LEAST} runs or more"
    count = f"{len(steps.found)} step{'' if len(steps.found) == 1 else 's'}" if steps.found else "no step"
    return f"{count} {where}: advice, no verdict"


def rows(steps: Steps, name_length: int | None = None) -> list[list[str]]:
    """The cells of HEADING, a row a step."""
    short = shorten((step.benchmark for step in steps.found), name_length)
    return [_row(step, short) for step in steps.found]


def commands(steps: Steps) -> list[str]:
    """The commands that look for the commits, each once."""
    return list(dict.fromkeys(step.command for step in steps.found if step.command))


def _row(step: Step, short: dict[str, str]) -> list[str]:
    form = step.metric.format
    way = "worse" if step.worse else "better"
    values = (form(step.before), form(step.after), signed(step.change), way)
    since = step.first.datetime[:10]
    return [short[step.benchmark], named(step.metric), *values, step.commits, since]
