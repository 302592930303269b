"""`python -m perf compare | ab | selftest | report | counters | accuracy | check-gpu | setup-peer`:
arguments, progress, codes.

Thin: the work is done elsewhere, by modules that are imported when used, so that `compare` and `report` never
wait for torch. Exit codes are those of perf/errors.py, 130 on Ctrl-C, and 70 where this program itself is at
fault, for 1 means a regression.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from engine import InputError
from perf import console
from perf.console import Counters, Csv, Html, Json, Markdown, Storage
from perf.errors import Exit, GateError
from perf.gate.saved_runs import load
from perf.gate.storage import STORAGE, folder

BROKEN = 70  # this program itself is at fault
ENOUGH = 0.95  # of injected slowdowns found, and of identical code left alone, in a self-test that succeeds
NEEDED = ("scipy", "jinja2", "pytest", "pytest_benchmark")  # the extra `perf`
CODES = "Exit codes: 0 pass, 1 regression, 2 usage, 3 not comparable, 4 inconclusive."
HELP = f"The performance gate. {CODES}"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)

BASELINE = "The baseline: the name it was saved by, its number, 0002_main or a file."
PytestArgs = Annotated[list[str] | None, Argument(metavar="[-- PYTEST ARGS]", help="What pytest is given.")]


@app.command()
def compare(
    base: Annotated[str, Argument(help=BASELINE)],
    head: Annotated[str, Argument(help="What is judged against it, likewise.")],
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

    files = console.writable(html=html, markdown=markdown, csv=csv, json=json)
    where = folder(storage)
    before, after = load(base, where), load(head, where)
    if before.path.samefile(after.path):
        same = f"{base!r} and {head!r} are the same file, {before.path}: a run always equals itself"
        raise GateError(same, Exit.USAGE)
    console.conclude(judge(before, after, counters=counters), **files)


@app.command()
def ab(
    base: Annotated[str, Argument(metavar="BASE_REV", help="A branch, tag or commit.")],
    head: Annotated[str, Argument(metavar="HEAD_REV", help="Likewise; '.' is the working tree as it is.")],
    pytest_args: PytestArgs = None,
    blocks: Annotated[int, Option(help="Pairs of fresh processes; four or more.")] = 6,
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

    files = console.writable(html=html, markdown=markdown, csv=csv, json=json)
    args = pytest_args or ["perf"]
    with console.progress(2 * blocks) as advance:
        comparison = measure(base, head, args, blocks=blocks, counters=counters, advance=advance)
    console.conclude(comparison, **files)


@app.command()
def selftest(
    pytest_args: PytestArgs = None,
    trials: Annotated[int, Option(help="A/B runs of each effect.")] = 20,
    effects: Annotated[
        str, Option(help="Injected slowdowns, comma-separated; 0 is identical code.")
    ] = "0,0.03,0.05,0.10",
    blocks: Annotated[int, Option(help="Pairs of fresh processes an A/B run.")] = 4,
    json: Json = None,
) -> None:
    """Measure how often identical code is called a regression here, and how often an injected slowdown is.

    PYTEST ARGS name a benchmark of yours, run whole in every block; without them a tiny model is timed on the
    CPU. Ends with code 1 if identical code fails in more than 1 run of 20, or the largest effect is found in
    fewer than 19.
    """
    from perf.gate.selftest import selftest as measure
    from perf.report.terminal import selftest_table, show

    console.writable(json=json)
    try:
        fractions = [float(effect) for effect in effects.split(",")]
    except ValueError:
        wrong = f"effects={effects!r} must be fractions, comma-separated: 0,0.05,0.1"
        raise GateError(wrong, Exit.USAGE) from None
    with console.progress(trials) as advance:
        report = measure(fractions, trials, pairs=blocks, args=pytest_args or (), advance=advance)
    show(selftest_table(report), console.WIDTH)
    console.write_json(json, report.plain(), allow_nan=True)
    idle = [rate for rate in report.rates if not rate.effect]
    quiet = all(rate.regressions <= (1 - ENOUGH) * len(rate.outcomes) for rate in idle)
    largest = max(report.rates, key=lambda rate: rate.effect)
    found = not largest.effect or largest.regressions >= ENOUGH * len(largest.outcomes)
    raise typer.Exit(Exit.PASS if quiet and found else Exit.REGRESSION)


@app.command()
def report(
    runs: Annotated[list[str], Argument(help="Names, numbers or files, oldest first.")],
    base: Annotated[
        str | None, Option(help="What the last is judged against; the first, if there are two.")
    ] = None,
    storage: Storage = str(STORAGE),
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
) -> None:
    """Show saved runs, as a table and as files. It judges, but ends with code 0 whatever it finds.

    What cannot be read of them is left out, and named. Where nothing can be, that is an error.
    """
    from perf import report as reports

    files = console.writable(html=html, markdown=markdown, csv=csv)
    found = reports.read(runs, base, folder(storage))
    said = found.comparison.notes if found.comparison else ()
    for note in dict.fromkeys(note for run in found.runs for note in run.notes if note not in said):
        console.say(f"note: {note}")
    console.show_reading(found, **files)


@app.command()
def counters(
    record: Annotated[bool, Option("--record", help="Take the counters as they are now for right.")] = False,
) -> None:
    """Compare exact counters with the committed ones: the gate that needs no quiet machine."""
    from perf.measure.counters import main as run

    raise typer.Exit(run(record))


@app.command()
def accuracy(
    text: Annotated[Path, Argument(help="A text file; its beginning is read.")],
    model: Annotated[str, Option(help="A model with a tokenizer.")] = "smollm2",
    tokens: Annotated[int, Option(min=2, help="Of the text, at most.")] = 2048,
) -> None:
    """Show what int8 does to a model on a text: perplexity beside float32's, and how often the top token
    agrees."""
    from engine import load as load_model
    from perf.measure.accuracy import accuracy as measure

    loaded = load_model(model, progress=True)
    if loaded.tokenizer is None:
        raise InputError(f"model={model!r} has no tokenizer: name one that has")
    ids = loaded.tokenizer(text.read_text(encoding="utf-8")).input_ids[:tokens]
    for name, value in measure(loaded, ids).items():
        typer.echo(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")


@app.command(name="check-gpu")
def check_gpu(
    out: Annotated[Path, typer.Option(help="The folder for logs, the saved run and a trace.")] = Path(
        "gpu-check"
    ),
    test_seconds: Annotated[float, typer.Option(min=1, help="Budget of the tests.")] = 275,
    benchmark_seconds: Annotated[float, typer.Option(min=1, help="Budget of the benchmarks.")] = 275,
) -> None:
    """Run the GPU tests of this checkout and then its benchmarks with --quick, within ten minutes.

    Ends with the exit code of the tests or, where they pass, of the benchmarks: 124 if one was cut off.
    """
    from perf.gpu_check import check_gpu as run
    from perf.report.terminal import show

    def say(what: Any) -> None:
        show(what, console.WIDTH)

    try:
        code = run(out, test_seconds=test_seconds, benchmark_seconds=benchmark_seconds, say=say)
    except KeyboardInterrupt:
        code = console.INTERRUPTED
    raise typer.Exit(code)


@app.command(name="setup-peer")
def setup_peer(name: Annotated[str, Argument(help="Which peer; see perf/backends.")]) -> None:
    """Make the virtual environment of a peer whose dependencies clash with ours."""
    from perf.backends.peers import setup_peer as make

    typer.echo(f"{name} is ready in {make(name)}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend ends in one message on standard error."""
    try:
        app(args)
    except GateError as error:
        console.fail(error, error.code)
    except (InputError, OSError) as error:
        console.fail(error, Exit.USAGE)
    except Exception as error:
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in NEEDED:
            console.fail(InputError(f"perf needs {missing}: pip install 'dynamic-batch[perf]'"), Exit.USAGE)
        traceback.print_exc()
        sys.exit(BROKEN)
