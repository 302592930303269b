"""Reports of saved runs and of comparisons: terminal, Markdown, one HTML page, CSV. Imports no torch.

`reading` reads what can be read, `verdicts` has the words, `figures` chooses charts, `charts` places them;
`terminal`, `session_tables`, `markdown` and `page` lay out. None of them judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perf.gate.saved_runs import Run
from perf.gate.verdict import Comparison
from perf.report.frame import frame
from perf.report.markdown import ROOM, markdown, markdown as _markdown
from perf.report.page import page
from perf.report.reading import Reading, read
from perf.report.terminal import comparison_table, runs_table

__all__ = ["Reading", "comparison_table", "frame", "markdown", "page", "read", "runs_table", "write"]


def write(
    runs: Sequence[Run],
    comparison: Comparison | None = None,
    left_out: Sequence[str] = (),
    *,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    csv: str | Path | None = None,
    append: bool = False,
) -> list[Path]:
    """Write the reports asked for, of runs oldest first; gives the files written. Raises OSError where it
    can't.

    With `append` the Markdown is added to what its file has; if that leaves it no room, it is not written.
    """
    written = []
    if html is not None:
        Path(html).write_text(page(runs, comparison, left_out), encoding="utf-8")
        written.append(Path(html))
    if markdown is not None:
        path = Path(markdown)
        before = path.read_bytes() if append and path.exists() else b""
        gap = "" if not before or before.endswith(b"\n") else "\n\n"
        room = ROOM - len(before) - len(gap)
        text = _markdown(runs, comparison, left_out, room=room, whole=str(html) if html else None)
        if text:
            with path.open("a" if append else "w", encoding="utf-8") as file:
                file.write(gap + text)
            written.append(path)
    if csv is not None:
        Path(csv).write_text(frame(runs).to_csv(index=False), encoding="utf-8", errors="backslashreplace")
        written.append(Path(csv))
    return written
