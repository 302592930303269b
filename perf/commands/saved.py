"""`perf save | compare | report`: runs that are kept."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from typer import Argument, Option

from perf import console
from perf.console import Branch, Counters, Csv, Html, Json, Markdown, PytestArgs, Remote, Storage
from perf.errors import Exit, GateError, sigterm_interrupts
from perf.gate.saved_runs import load, shared
from perf.gate.storage import STORAGE, folder
from perf.store.branch import BRANCH

app = typer.Typer()

BASELINE = "The baseline: the name it was saved by, or one session: its number, 0002_main or a file."


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
def report(
    runs: Annotated[
        list[str] | None, Argument(help="Names, numbers or files, oldest first; with --store, names.")
    ] = None,
    base: Annotated[
        str | None, Option(help="What the last is judged against; the first, if there are two.")
    ] = None,
    storage: Storage = str(STORAGE),
    store: Annotated[
        bool, Option("--store", help="Show the runs on the branch (perf store list), all or those named.")
    ] = False,
    since: Annotated[
        str | None, Option(metavar="DATE", help="Of --store: none before it, as 2026-11-30.")
    ] = None,
    last: Annotated[int | None, Option(min=1, help="Of --store: the latest so many runs.")] = None,
    remote: Remote = None,
    branch: Branch = BRANCH,
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
) -> None:
    """Show saved runs, as a table and as files: the last of them, its verdict, and the steps in the history.

    It judges, but ends with code 0 whatever it finds. What cannot be read of them is left out, and named.
    Where nothing can be, that is an error.
    """
    from perf import report as reports
    from perf.store import open_branch, stored

    files = console.writable(html=html, markdown=markdown, csv=csv)
    if not store and (since or last or not runs):
        need = "report needs runs" if not runs else f"--{'since' if since else 'last'} is of --store"
        raise GateError(f"{need}: name some, or give --store for those on the branch", Exit.USAGE)
    if store:
        day = console.iso_time(since) if since else ""
        with sigterm_interrupts(), TemporaryDirectory(prefix="perf-store-") as place:
            into = Path(place)
            kept = stored(open_branch(Path.cwd(), remote, branch), into)
            options: dict[str, Any] = {"names": runs or (), "since": day, "last": last}
            found = reports.read_runs(kept.runs, base, into, kept.left_out, **options)
    else:
        found = reports.read(runs or (), base, folder(storage))
    said = found.comparison.notes if found.comparison else ()
    for note in dict.fromkeys(note for run in found.runs for note in run.notes if note not in said):
        console.say(f"note: {note}")
    console.show_reading(found, **files)
