"""The runs on a branch as a table and as plain data: `perf store list`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from perf.gate.saved_runs import Run, short_commit
from perf.report.terminal import Fitted, table
from perf.report.text import clean
from perf.report.verdicts import day

HEADING = ("name", "sessions", "machine", "commit", "date")
NO_FOLDER = "-"


def stored_table(where: str, runs: Sequence[Run], left_out: Sequence[str], root: Path) -> RenderableType:
    """A row a run, oldest first, and what could not be read; `root` is the folder that files are in."""
    rows = [
        [run.name, str(run.sessions), _machine(run, root) or NO_FOLDER, short_commit(run, "-"), day(run)]
        for run in runs
    ]
    lines = [Text(f"left out: {clean(line)}", style="yellow") for line in left_out]
    return Fitted(
        lambda room: Group(table(HEADING, rows, ("sessions",), room, f"Runs on the {where}"), *lines)
    )


def plain(runs: Sequence[Run], left_out: Sequence[str], root: Path) -> dict[str, Any]:
    """The same for JSON, with the path of each session's file on the branch."""
    records = [
        {
            "name": run.name,
            "sessions": run.sessions,
            "machine": _machine(run, root),
            "node": run.machine.get("node"),
            "commit": run.commit.get("id"),
            "dirty": bool(run.commit.get("dirty")),
            "datetime": run.datetime,
            "files": [path.relative_to(root).as_posix() for path in run.paths],
        }
        for run in runs
    ]
    return {"runs": records, "left_out": list(left_out)}


def _machine(run: Run, root: Path) -> str:
    folder = run.path.parent.relative_to(root).as_posix()
    return "" if folder == "." else folder
