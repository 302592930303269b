"""`perf store push | pull | list`: saved runs on a branch of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument

from perf import console
from perf.console import Branch, Json, Remote, Storage
from perf.errors import sigterm_interrupts
from perf.gate.storage import STORAGE
from perf.store.branch import BRANCH

if TYPE_CHECKING:
    from perf.store import Moved

HELP = "Keep saved runs on a branch of the repository, from where every clone and CI has them."
app = typer.Typer()
store = typer.Typer(no_args_is_help=True, help=HELP)
app.add_typer(store, name="store")


@store.command()
def push(
    names: Annotated[list[str], Argument(metavar="NAME...", help="As compare takes them.")],
    remote: Remote = None,
    branch: Branch = BRANCH,
    storage: Storage = str(STORAGE),
) -> None:
    """Put saved runs on the branch, a commit a run: each name all sessions of the last one's commit.

    Safe beside other writers: nothing is overwritten or lost. What is there already is not put there again.
    """
    from perf.store import open_branch, push as put

    with sigterm_interrupts():
        target = open_branch(Path.cwd(), remote, branch)
        _tell(put(names, target, storage), f"pushed to the {target}")


@store.command()
def pull(
    names: Annotated[
        list[str] | None, Argument(metavar="[NAME...]", help="What they were saved by; all without any.")
    ] = None,
    remote: Remote = None,
    branch: Branch = BRANCH,
    storage: Storage = str(STORAGE),
) -> None:
    """Copy saved runs from the branch into the storage, where compare and report find them."""
    from perf.store import open_branch, pull as get

    with sigterm_interrupts():
        source = open_branch(Path.cwd(), remote, branch)
        _tell(get(names or (), source, storage), f"pulled from the {source}")


@store.command(name="list")
def show_list(remote: Remote = None, branch: Branch = BRANCH, json: Json = None) -> None:
    """Show the runs on the branch, oldest first: sessions of one name and commit are one run."""
    import tempfile

    from perf.report.stored_runs import plain, stored_table
    from perf.report.terminal import show
    from perf.store import open_branch, stored

    console.writable(json=json)
    with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="perf-store-") as folder:
        source = open_branch(Path.cwd(), remote, branch)
        found = stored(source, Path(folder))
        show(stored_table(str(source), found.runs, found.left_out, Path(folder)), console.WIDTH)
        console.write_json(json, plain(found.runs, found.left_out, Path(folder)))


def _tell(moved: list[Moved], what: str) -> None:
    """Say of each run what was done with its sessions, and which files have another number now."""
    for run in moved:
        for note in run.notes:
            console.say(f"note: {note}")
        count = f"{len(run.files)} session{'' if len(run.files) == 1 else 's'}"
        there = f"; {len(run.known)} there already ({', '.join(run.known)})" if run.known else ""
        renamed = ", ".join(f"{old} as {new}" for old, new in run.files if old != new)
        typer.echo(f"{run.name}: {count} {what}{f' ({renamed})' if renamed else ''}{there}")
