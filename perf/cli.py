"""`python -m perf save | compare | ab | bisect | selftest | report | counters | accuracy | check-gpu |
setup-peer`:
arguments, progress, codes.

Thin: the work is done elsewhere, by modules that are imported when used, so that `compare` and `report` never
wait for torch. Exit codes are those of perf/errors.py, 130 on Ctrl-C, and 70 where this program itself is at
fault, for 1 means a regression.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from engine import InputError
from perf import console
from perf.console import Budget, Counters, Csv, Html, Json, Markdown, Storage
from perf.errors import Exit, GateError
from perf.gate.saved_runs import load, shared
from perf.gate.storage import STORAGE, folder

BROKEN = 70  # this program itself is at fault
ENOUGH = 0.95  # of injected slowdowns found, and of identical code left alone, in a self-test that succeeds
NEEDED = ("scipy", "jinja2", "pytest", "pytest_benchmark")  # the extra `perf`
CODES = "Exit codes: 0 pass, 1 regression, 2 usage, 3 not comparable, 4 inconclusive."
HELP = f"The performance gate. {CODES}"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)

BASELINE = "The baseline: the name it was saved by, or one session: its number, 0002_main or a file."
Pairs = Annotated[int, Option(help="Pairs of processes, one after the other.")]
MinRound = Annotated[
    float,
    Option(parser=console.seconds, metavar="TIME", help="Rounds are repeated until a turn takes so long."),
]
PytestArgs = Annotated[list[str] | None, Argument(metavar="[-- PYTEST ARGS]", help="What pytest is given.")]


@app.command()
def save(
    name: Annotated[str, Argument(help="The name that all of them are saved by.")],
    pytest_args: PytestArgs = None,
    sessions: Annotated[int, Option(help="How many, one after the other.")] = 3,
) -> None:
    """Measure this checkout as it is in several sessions of pytest, each a fresh process, under one name.

    compare takes them together, and from how they differ it knows the machine's noise. PYTEST ARGS default
    to: perf
    """
    from perf.gate.saving_sessions import save_sessions

    saved = 0
    with console.progress(sessions) as advance:
        try:
            for saved in save_sessions(name, sessions, pytest_args or ["perf"], advance=advance):  # noqa: B007
                pass
        except KeyboardInterrupt:
            console.say(f"interrupted; saved as {name!r}: {saved} of {sessions} sessions")
            raise typer.Exit(console.INTERRUPTED) from None
    typer.echo(f"saved as {name!r}: {saved} of {sessions} sessions")


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

    All that was saved under a name of one commit is one run of several sessions. How sessions of the same
    code vary is known from both sides, other runs in the storage, and selftest; where nothing is known, there
    is no verdict on times. See save, or ab for a machine that others use.
    """
    from perf.gate.noise import read_noise
    from perf.gate.verdict import compare_saved

    files = console.writable(html=html, markdown=markdown, csv=csv, json=json)
    where = folder(storage)
    before, after = load(base, where), load(head, where)
    if path := shared(before, after):
        same = f"{base!r} and {head!r} both have the session {path}: it always equals itself"
        raise GateError(same, Exit.USAGE)
    noise = read_noise(where, [before, after])
    console.conclude(compare_saved(before, after, noise, counters=counters), **files)


@app.command()
def ab(
    base: Annotated[str, Argument(metavar="BASE_REV", help="A branch, tag or commit.")],
    head: Annotated[str, Argument(metavar="HEAD_REV", help="Likewise; '.' is the working tree as it is.")],
    pytest_args: PytestArgs = None,
    budget: Budget = 300.0,
    pairs: Pairs = 3,
    min_round: MinRound = 0.02,
    interleave: Annotated[
        str, Option(help="What takes turns: rounds of two live processes, or whole processes (blocks).")
    ] = "rounds",
    blocks: Annotated[
        int, Option(help="Pairs of whole processes, where those take turns; four or more.")
    ] = 6,
    counters: Counters = True,
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
    json: Json = None,
) -> None:
    """Measure two revisions in turn, in worktrees and processes of their own, until it is sure: the way on a
    noisy machine.

    PYTEST ARGS default to: perf
    """
    from perf.ab.main import ab as measure

    files = console.writable(html=html, markdown=markdown, csv=csv, json=json)
    options: dict[str, Any] = {"interleave": interleave, "blocks": blocks, "counters": counters}
    options |= {"budget": budget, "pairs": pairs, "round_s": min_round}
    with console.progress(2 * blocks if interleave == "blocks" else pairs) as advance:
        comparison = measure(base, head, pytest_args or ["perf"], **options, advance=advance)
    console.conclude(comparison, **files)


@app.command()
def bisect(
    good: Annotated[str, Argument(metavar="GOOD_REV", help="An ancestor of BAD_REV that is fast enough.")],
    bad: Annotated[str, Argument(metavar="BAD_REV", help="One that is not; '.' is the working tree.")],
    pytest_args: PytestArgs = None,
    budget: Annotated[
        float,
        Option(
            parser=console.seconds, metavar="TIME", help="Of each judgement (90s, 5m); twice that to be sure."
        ),
    ] = 300.0,
    first_parent: Annotated[
        bool, Option("--first-parent", help="Take a merge for one commit; leave alone what it merged.")
    ] = False,
    counters: Counters = True,
    json: Json = None,
) -> None:
    """Find the commit that made a benchmark worse: git's bisection, each commit measured against GOOD_REV.

    The checkout stays as it is. Ends with code 0 if the commit is found, with 4 if several remain that cannot
    be judged. PYTEST ARGS default to: perf
    """
    from perf.ab.bisect import Bisection
    from perf.ab.main import ab as measure
    from perf.report.bisect_table import bisect_table
    from perf.report.terminal import show
    from perf.report.text import clean

    console.writable(json=json)
    judge = partial(measure, counters=counters)
    args = pytest_args or ["perf"]
    search = Bisection(good, bad, args, judge, budget=budget, first_parent=first_parent)
    with console.progress(search.expected) as advance:
        search.advance = lambda line: advance(clean(line))
        with suppress(KeyboardInterrupt):  # the report tells
            search.run()
    found = search.report()
    code = int(found.exit) if found.complete else console.INTERRUPTED
    if found.judgements:
        show(bisect_table(found), console.WIDTH)
    if not found.complete:
        console.say(f"interrupted: {len(found.judgements)} judgements were made, and nothing is left behind")
    console.write_json(json, {"exit": code, **found.plain()})
    raise typer.Exit(code)


@app.command()
def selftest(
    pytest_args: PytestArgs = None,
    trials: Annotated[int, Option(help="A/B runs of each slowdown.")] = 20,
    effects: Annotated[
        str,
        Option(help="Injected slowdowns, comma-separated: 0 is identical code, 0.05 every step 5 % longer, "
               "0.2@chunks steps with a prompt's chunk, 1.5@10 every tenth step."),
    ] = "0,0.03,0.05,0.10",
    budget: Budget = 120.0,
    idle_budget: Annotated[
        float | None, Option(parser=console.seconds, metavar="TIME", help="Of identical code, if another.")
    ] = None,
    pairs: Pairs = 3,
    min_round: MinRound = 0.02,
    storage: Storage = str(STORAGE),
    json: Json = None,
) -> None:  # fmt: skip
    """Measure how often identical code is called a regression here, and how often an injected slowdown is.

    PYTEST ARGS name a benchmark of yours; without them a tiny model is timed on the CPU. How much fresh
    processes differ is kept beside the saved runs, where compare finds it. Ends with code 1 if identical code
    fails in more than 1 run of 20, or the largest slowdown is found in fewer than 19.
    """
    from perf.ab.experiment import Plan
    from perf.ab.selftest import selftest as measure
    from perf.gate.noise import write_noise
    from perf.measure.slowdown import Slowdown
    from perf.report.terminal import selftest_table, show

    console.writable(json=json)
    names = [effect.strip() for effect in effects.split(",")]
    for name in names:
        Slowdown.parse(name)
    plan = Plan(budget, pairs, min_round)
    with console.progress(trials) as advance:
        report = measure(
            names, trials, plan=plan, idle_budget_s=idle_budget, args=pytest_args or (), advance=advance
        )
    show(selftest_table(report), console.WIDTH)
    if report.noise:
        console.say(f"how much fresh processes differ is kept in {write_noise(storage, report.noise)}")
    console.write_json(json, report.plain())
    if not report.complete:
        console.say(f"interrupted: {len(report.rates[0].outcomes)} of {trials} trials were run")
        raise typer.Exit(console.INTERRUPTED)
    raise typer.Exit(Exit.PASS if report.good(ENOUGH) else Exit.REGRESSION)


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
