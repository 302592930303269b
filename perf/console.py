"""What the commands of `perf` share: their options, progress, what they print and write, and how they end."""

from __future__ import annotations

import json as json_module
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from perf import config
from perf.errors import Exit, GateError

if TYPE_CHECKING:
    from perf.gate.comparison import Comparison
    from perf.report import Reading

INTERRUPTED = 130
WIDTH = 180  # columns of a table where there is no terminal
MOST_COMMANDS = 5  # that look for a commit
ERRORS = Console(stderr=True)


def seconds(text: str | float) -> float:
    """Return a length of time in seconds, as perf/config.py reads it.

    Raises:
        typer.BadParameter: for what is none.
    """
    try:
        return config.seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def iso_time(text: str) -> str:
    """Return a day or a time of ISO 8601 as saved runs have theirs, in UTC, such that the texts compare.

    Raises:
        GateError: code 2, for what is neither.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise GateError(f"{text!r} is no date: give one as 2026-11-30", Exit.USAGE) from None
    return (found.astimezone(UTC) if found.tzinfo else found).strftime("%Y-%m-%dT%H:%M:%S")


File = Path | None
Storage = Annotated[str, Option(help="Where pytest-benchmark saves runs: a folder, or file://FOLDER.")]
Html = Annotated[File, Option(help="Write a page here that needs no network.")]
Markdown = Annotated[File, Option(help="Write a summary here; added to it if it is $GITHUB_STEP_SUMMARY.")]
Csv = Annotated[File, Option(help="Write a row a benchmark here.")]
Json = Annotated[File, Option(help="Write every verdict here.")]
Budget = Annotated[
    float, Option(parser=seconds, metavar="TIME", help="Time by the clock, all in all: 90s, 5m, 1h.")
]
PytestArgs = Annotated[list[str] | None, Argument(metavar="[-- PYTEST ARGS]", help="What pytest is given.")]
Remote = Annotated[
    str | None, Option(help="The remote that has the runs: origin, if there is one; '.' is this repository.")
]
Branch = Annotated[str, Option(help="The branch they are on.")]
Counters = Annotated[bool, Option(help="Whether exact counters are judged too.")]


def conclude(comparison: Comparison, json: File, **files: File) -> None:
    """Print and write a comparison, and end with its exit code."""
    from perf.report import Reading

    show_reading(Reading((comparison.base, comparison.head), comparison, ()), **files)
    write_json(json, comparison.plain())
    raise typer.Exit(comparison.exit)


def show_reading(found: Reading, markdown: File, **files: File) -> None:
    """Print what there is, and write it to the files asked for."""
    from perf import report as reports
    from perf.report.terminal import show

    judged, left_out = found.comparison, found.left_out
    table = reports.comparison_table(judged, left_out) if judged else reports.runs_table(found.runs, left_out)
    if found.steps.searched:
        show(reports.steps_table(found.steps), WIDTH)
        for command in reports.commands(found.steps)[:MOST_COMMANDS]:
            typer.echo(command)  # in one line, to be copied
    show(table, WIDTH)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    append = markdown is not None and summary is not None and Path(summary).resolve() == markdown.resolve()
    written = reports.write(
        found.runs, judged, left_out, markdown=markdown, append=append, steps=found.steps, **files
    )
    if markdown and markdown not in written:
        say(f"note: --markdown {markdown} has no room left for a summary: GitHub shows 1 MiB a step")


def write_json(path: File, plain: dict[str, Any], allow_nan: bool = False) -> None:
    """Write a record to the file asked for, if one was."""
    if path:
        text = json_module.dumps(plain, indent=2, allow_nan=allow_nan)
        path.write_text(f"{text}\n", encoding="utf-8")


def writable(**paths: File) -> dict[str, File]:
    """The same files, by option. Raises GateError, before anything is measured, for one that could not be
    written."""
    for option, path in paths.items():
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            way_out = "name a file in a folder that is there"
            raise GateError(f"--{option} {path} cannot be written: {way_out}", Exit.USAGE)
    return paths


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, or lines where that is no terminal; the call it gives names what begins now.

    Ctrl-C ends the program with code 130.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    drawn = sys.stderr.isatty()  # not what rich takes for a terminal: FORCE_COLOR makes it one of a log file
    begun = 0

    def advance(line: str) -> None:
        nonlocal begun
        bar.update(task, description=escape(line), completed=begun)
        begun += 1
        if not drawn:
            say(line)

    with Progress(*columns, console=ERRORS, transient=True, disable=not drawn) as bar:
        task = bar.add_task("starting", total=total)
        try:
            yield advance
        except KeyboardInterrupt:
            bar.stop()
            say("interrupted: nothing was decided, and nothing is left behind")
            raise typer.Exit(INTERRUPTED) from None


def typed(context: typer.Context, parameter: str) -> bool:
    """Return whether a parameter of the command that runs was given by its user, not by the settings."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def fail(error: Exception, code: int) -> NoReturn:
    """End the program with an error's message and a code."""
    say(f"error: {error}", style="red")
    sys.exit(code)


def say(line: str, style: str | None = None) -> None:
    """Write a line on standard error as it is."""
    ERRORS.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
