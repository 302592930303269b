"""Reports of saved runs and of comparisons: terminal, Markdown, one HTML page, CSV. Imports no torch.

`reading` reads what can be read, `verdicts` has the words, `figures` chooses charts, `charts` places them;
`terminal`, `session_tables`, `markdown` and `page` lay out. None of them judges.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perf.gate.comparison import Comparison
from perf.gate.saved_runs import Run
from perf.gate.steps import NO_STEPS, Steps
from perf.report.markdown import ROOM, markdown, markdown as _markdown
from perf.report.page import page
from perf.report.reading import Reading, read, read_runs
from perf.report.steps import commands
from perf.report.terminal import comparison_table, runs_table, steps_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Reading",
    "commands",
    "comparison_table",
    "frame",
    "markdown",
    "page",
    "read",
    "read_runs",
    "runs_table",
    "steps_table",
    "write",
]


def write(
    runs: Sequence[Run],
    comparison: Comparison | None = None,
    left_out: Sequence[str] = (),
    *,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    csv: str | Path | None = None,
    append: bool = False,
    steps: Steps = NO_STEPS,
) -> list[Path]:
    """Write the reports asked for, of runs oldest first; gives the files written. Raises OSError where it
    can't.

    With `append` the Markdown is added to what its file has; if that leaves it no room, it is not written.
    """
    written = []
    if html is not None:
        Path(html).write_text(page(runs, comparison, left_out, steps), encoding="utf-8")
        written.append(Path(html))
    if markdown is not None:
        path = Path(markdown)
        before = path.read_bytes() if append and path.exists() else b""
        gap = "" if not before or before.endswith(b"\n") else "\n\n"
        room = ROOM - len(before) - len(gap)
        page_name = str(html) if html else None
        text = _markdown(runs, comparison, left_out, steps=steps, room=room, whole=page_name)
        if text:
            with path.open("a" if append else "w", encoding="utf-8") as file:
                file.write(gap + text)
            written.append(path)
    if csv is not None:
        Path(csv).write_text(frame(runs).to_csv(index=False), encoding="utf-8", errors="backslashreplace")
        written.append(Path(csv))
    return written


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run and benchmark: where it comes from, our record, `fingerprint.*`, `rounds.*`, each a JSON
    list of one value a round, and `extra_info.*`, the notes of others."""
    import pandas as pd

    rows = []
    for run in runs:
        source = {"run": run.name, "commit": run.commit.get("id"), "datetime": run.datetime}
        for name, b in run.benchmarks.items():
            prints = {f"fingerprint.{key}": value for key, value in b.fingerprint.items()}
            rounds = {f"rounds.{key}": json.dumps(values) for key, values in b.rounds.items()}
            notes = {f"extra_info.{key}": value for key, value in b.notes.items()}
            measured = {**b.info, **prints, **rounds, **notes}
            rows.append({**source, "benchmark": name, "group": b.group, **measured})
    return pd.DataFrame(rows)
