"""`python -m perf compare | ab | selftest | report | counters | accuracy | setup-peer`: arguments, progress,
codes.

Thin: what it does is done elsewhere, and imported when used, so that `compare` and `report` never wait for
torch. Exit codes are those of perf/errors.py, 130 on Ctrl-C, and 70 where this program itself is at fault,
for 1 means a regression.
"""

from __future__ import annotations

import json as json_module
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from engine import InputError
from perf.gate.saved_runs import STORAGE, Exit, GateError, Run, load
from perf.gate.storage import folder

if TYPE_CHECKING:
    from perf.gate.selftest import Report
    from perf.gate.verdict import Comparison

INTERRUPTED, BROKEN = 130, 70
ENOUGH = 0.95  # of injected slowdowns found, and of identical code left alone, in a self-test that succeeds
NEEDED = ("scipy", "pytest", "pytest_benchmark")  # the extra `perf`
ERRORS = Console(stderr=True)
CODES = "Exit codes: 0 pass, 1 regression, 2 usage, 3 not comparable, 4 inconclusive."
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=f"The performance gate. {CODES}",
)

Storage = Annotated[str, typer.Option(help="Where pytest-benchmark saves runs: a folder, or file://FOLDER.")]
Html = Annotated[Path | None, typer.Option(help="Write a page here that needs no network.")]
Markdown = Annotated[
    Path | None, typer.Option(help="Write a summary here; added to it if it is $GITHUB_STEP_SUMMARY.")
]
Csv = Annotated[Path | None, typer.Option(help="Write a row a benchmark here.")]
Json = Annotated[Path | None, typer.Option(help="Write every verdict here.")]
Counters = Annotated[bool, typer.Option(help="Whether exact counters are judged too.")]
PytestArgs = Annotated[
    list[str] | None, typer.Argument(metavar="[-- PYTEST ARGS]", help="What pytest is given.")
]


@app.command()
def compare(
    base: Annotated[
        str, typer.Argument(help="The baseline: the name it was saved by, its number, 0002_main or a file.")
    ],
    head: Annotated[str, typer.Argument(help="What is judged against it, likewise.")],
    storage: Storage = str(STORAGE),
    counters: Counters = True,
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
    json: Json = None,
) -> None:
    """Judge one saved run against another, of the same machine.

    How rounds vary within a run is accounted for; that a machine is slower today than it was is not, beyond a
    note when its canary says so. Where that matters, use ab.
    """
    from perf.gate.verdict import compare as judge

    _writable(html=html, markdown=markdown, csv=csv, json=json)
    where = folder(storage)
    before, after = load(base, where), load(head, where)
    if before.path.samefile(after.path):
        raise GateError(
            f"{base!r} and {head!r} are the same file, {before.path}: a run always equals itself", Exit.USAGE
        )
    _conclude(judge(before, after, counters=counters), html, markdown, csv, json)


@app.command()
def ab(
    base: Annotated[str, typer.Argument(metavar="BASE_REV", help="A branch, tag or commit.")],
    head: Annotated[
        str, typer.Argument(metavar="HEAD_REV", help="Likewise; '.' is the working tree as it is.")
    ],
    pytest_args: PytestArgs = None,
    blocks: Annotated[int, typer.Option(help="Pairs of fresh processes; four or more.")] = 6,
    counters: Counters = True,
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
    json: Json = None,
) -> None:
    """Measure two revisions in turn, in worktrees and processes of their own, and judge: the way on a noisy
    machine.

    PYTEST ARGS default to: perf
    """
    from perf.gate.ab import ab as measure

    _writable(html=html, markdown=markdown, csv=csv, json=json)
    with _progress("starting", 2 * blocks) as advance:
        comparison = measure(
            base, head, pytest_args or ["perf"], blocks=blocks, counters=counters, advance=advance
        )
    _conclude(comparison, html, markdown, csv, json)


@app.command()
def selftest(
    pytest_args: PytestArgs = None,
    trials: Annotated[int, typer.Option(help="A/B runs of each effect.")] = 20,
    effects: Annotated[str, typer.Option(help="Planted slowdowns, comma-separated; 0 is identical code.")] = (
        "0,0.03,0.05,0.10"
    ),
    blocks: Annotated[int, typer.Option(help="Pairs of fresh processes an A/B run.")] = 4,
    json: Json = None,
) -> None:
    """Measure how often identical code is called a regression here, and how often an injected slowdown is.

    PYTEST ARGS name a benchmark of yours, run whole in every block; without them a tiny model is timed on the
    CPU. Ends with code 1 if identical code fails in more than 1 run of 20, or the largest effect is found in
    fewer than 19.
    """
    from perf.gate.selftest import selftest as measure

    _writable(json=json)
    try:
        fractions = [float(effect) for effect in effects.split(",")]
    except ValueError:
        raise GateError(
            f"effects={effects!r} must be fractions, comma-separated: 0,0.05,0.1", Exit.USAGE
        ) from None
    with _progress("starting", trials) as advance:
        report = measure(fractions, trials, pairs=blocks, args=pytest_args or (), advance=advance)
    _show(report)
    if json:
        json.write_text(json_module.dumps(report.plain(), indent=2) + "\n", encoding="utf-8")
    quiet = all(
        rate.regressions <= (1 - ENOUGH) * len(rate.outcomes) for rate in report.rates if not rate.effect
    )
    largest = max(report.rates, key=lambda rate: rate.effect)
    found = not largest.effect or largest.regressions >= ENOUGH * len(largest.outcomes)
    raise typer.Exit(Exit.PASS if quiet and found else Exit.REGRESSION)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Names, numbers or files, oldest first.")],
    base: Annotated[
        str | None, typer.Option(help="What the last is judged against; the first, if there are two.")
    ] = (None),
    storage: Storage = str(STORAGE),
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
) -> None:
    """Show saved runs, as a table and as files. It judges, but ends with code 0 whatever it finds.

    What cannot be read of them is left out, and named. Where nothing can be, that is an error.
    """
    from perf import report as reports

    _writable(html=html, markdown=markdown, csv=csv)
    found = reports.read(runs, base, folder(storage))
    for note in dict.fromkeys(note for run in found.runs for note in run.notes):
        if found.comparison is None or note not in found.comparison.notes:
            ERRORS.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if found.comparison is None:
        _print(reports.runs_table(found.runs, found.left_out))
    else:
        _print(reports.comparison_table(found.comparison, found.left_out))
    _write(found.runs, found.comparison, html, markdown, csv, found.left_out)


@app.command()
def counters(
    record: Annotated[
        bool, typer.Option("--record", help="Take the counters as they are now for right.")
    ] = False,
) -> None:
    """Compare exact counters with the committed ones: the gate that needs no quiet machine."""
    from perf.measure.counters import main as run

    raise typer.Exit(run(record))


@app.command()
def accuracy(
    text: Annotated[Path, typer.Argument(help="A text file; its beginning is read.")],
    model: Annotated[str, typer.Option(help="A model with a tokenizer.")] = "smollm2",
    tokens: Annotated[int, typer.Option(min=2, help="Of the text, at most.")] = 2048,
) -> None:
    """Show what int8 does to a model on a text: perplexity beside float32's, and how often the top token
    agrees."""
    from engine import load as load_model
    from perf.measure.accuracy import accuracy as measure

    loaded = load_model(model, progress=True)
    if loaded.tokenizer is None:
        raise InputError(f"model={model!r} has no tokenizer: name one that has")
    for name, value in measure(
        loaded, loaded.tokenizer(text.read_text(encoding="utf-8")).input_ids[:tokens]
    ).items():
        typer.echo(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")


@app.command(name="setup-peer")
def setup_peer(name: Annotated[str, typer.Argument(help="Which peer; see perf/backends.")]) -> None:
    """Make the virtual environment of a peer whose dependencies clash with ours."""
    from perf.backends.peers import setup_peer as make

    typer.echo(f"{name} is ready in {make(name)}")


def _conclude(
    comparison: Comparison, html: Path | None, markdown: Path | None, csv: Path | None, json: Path | None
) -> None:
    """Print and write a comparison, and end with its exit code."""
    from perf.report import comparison_table

    _print(comparison_table(comparison))
    _write([comparison.base, comparison.head], comparison, html, markdown, csv)
    if json:
        json.write_text(
            json_module.dumps(comparison.plain(), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    raise typer.Exit(comparison.exit)


def _write(
    runs: Sequence[Run],
    comparison: Comparison | None,
    html: Path | None,
    markdown: Path | None,
    csv: Path | None,
    left_out: Sequence[str] = (),
) -> None:
    from perf import report as reports

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    append = markdown is not None and summary is not None and Path(summary).resolve() == markdown.resolve()
    written = reports.write(runs, comparison, left_out, html=html, markdown=markdown, csv=csv, append=append)
    if markdown and markdown not in written:
        full = f"note: --markdown {markdown} has no room left for a summary: GitHub shows 1 MiB a step"
        ERRORS.print(full, markup=False, highlight=False, soft_wrap=True)


def _print(what: Any) -> None:
    Console(width=None if sys.stdout.isatty() else 180).print(what)


def _show(report: Report) -> None:
    from rich.table import Table

    from perf.gate.metrics import METRICS

    table = Table(title=f"A/B runs of {report.pairs} pairs of blocks", title_justify="left")
    for heading in ("injected", "called a regression", "true rate, 95 % sure", "can't tell", "pass"):
        table.add_column(heading, justify="right")
    for rate in report.rates:
        low, high = rate.bounds
        total, said = len(rate.outcomes), [str(outcome) for outcome in rate.outcomes]
        undecided = said.count("INCONCLUSIVE")
        cells = (
            f"{rate.regressions} of {total}",
            f"{low:.0%} to {high:.0%}",
            str(undecided),
            str(said.count("PASS")),
        )
        table.add_row("nothing" if rate.effect == 0 else f"{rate.effect:.1%} slower", *cells)
    each = Table(title="metric by metric: regressions called", title_justify="left")
    each.add_column("metric")
    for rate in report.rates:
        each.add_column("nothing" if rate.effect == 0 else f"{rate.effect:.1%}", justify="right")
    each.add_column("sees, four times in five", justify="right")
    for name, size in report.visible.items():
        counts = (f"{rate.failed.get(name, 0)} of {len(rate.outcomes)}" for rate in report.rates)
        each.add_row(METRICS[name].label, *counts, f"{size:.1%}")
    _print(table)
    _print(each)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error; the call it gives names what begins now. Ctrl-C ends the program with code
    130."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    begun = 0

    def advance(line: str) -> None:
        nonlocal begun
        bar.update(task, description=escape(line), completed=begun)
        begun += 1
        if not ERRORS.is_terminal:
            ERRORS.print(line, markup=False, highlight=False)

    with Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        try:
            yield advance
        except KeyboardInterrupt:
            bar.stop()
            ERRORS.print("interrupted: nothing was decided, and nothing is left behind")
            raise typer.Exit(INTERRUPTED) from None


def _writable(**paths: Path | None) -> None:
    """Raises GateError for a file that could not be written, before anything is measured."""
    for option, path in paths.items():
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise GateError(
                f"--{option} {path} cannot be written: name a file in a folder that is there", Exit.USAGE
            )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend ends in one message on standard error."""
    try:
        app(args)
    except GateError as error:
        _fail(error, error.code)
    except (InputError, OSError) as error:
        _fail(error, Exit.USAGE)
    except Exception as error:
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in NEEDED:
            _fail(InputError(f"perf needs {missing}: pip install 'dynamic-batch[perf]'"), Exit.USAGE)
        traceback.print_exc()
        sys.exit(BROKEN)


def _fail(error: Exception, code: int) -> None:
    ERRORS.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
