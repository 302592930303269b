"""`perf import`: results of other load tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from perf import config, console
from perf.console import Storage
from perf.gate.storage import STORAGE, check_name, folder
from perf.importers import Tool

app = typer.Typer()


@app.command(name="import")
def import_(
    tool: Annotated[Tool, Argument(help="What wrote the files.")],
    files: Annotated[list[Path], Argument(metavar="FILE...", help="Its results, each a round of one run.")],
    save: Annotated[str, Option(metavar="NAME", help="The name that the run is saved by.")],
    storage: Storage = str(STORAGE),
) -> None:
    """Save results of another load tool as a run of ours, for compare and report.

    Several files are rounds of one session: of one process of the server. Import what another process of it
    gave under the same name again: sessions are what compare counts.
    """
    from perf.gate.writing import save as save_run
    from perf.importers.record import notes, rounds_of, run_of

    check_name(save)
    where = folder(storage)
    rounds = rounds_of(tool, files)
    path = save_run(run_of(tool, rounds, config.load(Path.cwd()).tolerances), save, where)
    for note in dict.fromkeys(note for some in rounds.values() for note in notes(some)):
        console.say(f"note: {note}")
    counts = (f"{name} ({len(some)} round{'s' if len(some) > 1 else ''})" for name, some in rounds.items())
    typer.echo(f"saved as {save!r} in {path}: {', '.join(counts)}")
