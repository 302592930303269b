"""`perf ab | bisect | selftest`: revisions that take turns."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from typer import Argument, Option

from perf import console
from perf.console import Budget, Counters, Csv, Html, Json, Markdown, PytestArgs, Storage
from perf.errors import Exit
from perf.gate.storage import STORAGE
from perf.servers.launch import READY_S

app = typer.Typer()

ENOUGH = 0.95  # of injected slowdowns found, and of identical code left alone, in a self-test that succeeds
Pairs = Annotated[int, Option(help="Pairs of processes, one after the other.")]
MinRound = Annotated[
    float,
    Option(parser=console.seconds, metavar="TIME", help="Rounds are repeated until a turn takes so long."),
]
Serve = Annotated[
    str | None,
    Option(metavar="CMD", help="Measure a server: its command, run in each tree, with {port} in it."),
]
Ready = Annotated[
    float, Option(parser=console.seconds, metavar="TIME", help="A server must be ready after so long.")
]


@app.command()
def ab(
    context: typer.Context,
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
    serve: Serve = None,
    serve_base: Annotated[str | None, Option(metavar="CMD", help="The command of base's server.")] = None,
    serve_head: Annotated[str | None, Option(metavar="CMD", help="The command of head's server.")] = None,
    ready: Ready = READY_S,
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
    json: Json = None,
) -> None:
    """Measure two revisions in turn, in worktrees and processes of their own, until it is sure: the way on a
    noisy machine.

    PYTEST ARGS default to: perf; where servers are measured, to the benchmark of a server.
    """
    from perf.ab.main import ab as measure
    from perf.ab.serving import Serving

    files = console.writable(html=html, markdown=markdown, csv=csv, json=json)
    options: dict[str, Any] = {"interleave": interleave, "blocks": blocks, "counters": counters}
    options |= {"budget": budget, "pairs": pairs, "round_s": min_round}
    options["serving"] = serving = Serving.of(serve, serve_base, serve_head, ready)
    args = serving.args(pytest_args or (), console.typed(context, "pytest_args"))
    with console.progress(2 * blocks if interleave == "blocks" else pairs) as advance:
        comparison = measure(base, head, args, **options, advance=advance)
    console.conclude(comparison, **files)


@app.command()
def bisect(
    context: typer.Context,
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
    serve: Serve = None,
    ready: Ready = READY_S,
    json: Json = None,
) -> None:
    """Find the commit that made a benchmark worse: git's bisection, each commit measured against GOOD_REV.

    The checkout stays as it is. Ends with code 0 if the commit is found, with 4 if several remain that cannot
    be judged. PYTEST ARGS default as those of ab do.
    """
    from perf.ab.bisect import Bisection
    from perf.ab.main import ab as measure
    from perf.ab.serving import Serving
    from perf.report.bisect_table import bisect_table
    from perf.report.terminal import show
    from perf.report.text import clean

    console.writable(json=json)
    serving = Serving.of(serve, None, None, ready)
    judge = partial(measure, counters=counters, serving=serving)
    args = serving.args(pytest_args or (), console.typed(context, "pytest_args"))
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
    own_args: PytestArgs = None,
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
    idle_trials: Annotated[int | None, Option(help="Of identical code, if more.")] = None,
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
    with console.progress(max(trials, idle_trials or 0)) as advance:
        report = measure(
            names,
            trials,
            plan=plan,
            idle_budget_s=idle_budget,
            idle_trials=idle_trials,
            args=own_args or (),
            advance=advance,
        )
    show(selftest_table(report), console.WIDTH)
    if report.noise:
        console.say(f"how much fresh processes differ is kept in {write_noise(storage, report.noise)}")
    console.write_json(json, report.plain())
    if report.trials < report.asked:
        console.say(f"interrupted: {report.trials} of {report.asked} trials were run")
        raise typer.Exit(console.INTERRUPTED)
    raise typer.Exit(Exit.PASS if report.good(ENOUGH) else Exit.REGRESSION)
