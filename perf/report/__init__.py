"""Reports of saved runs and of comparisons: terminal, Markdown, one HTML page, CSV. Imports no torch.

`verdicts` has the words, `figures` chooses charts, `charts` draws them, `page` and `text` lay out. None of them judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perf.gate import Comparison
from perf.report import text
from perf.report.page import page
from perf.report.text import comparison_table, frame, markdown, runs_table
from perf.runs import Run

__all__ = ["comparison_table", "frame", "markdown", "page", "runs_table", "write"]


def write(
    runs: Sequence[Run],
    comparison: Comparison | None = None,
    *,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    csv: str | Path | None = None,
) -> list[Path]:
    """Write the reports asked for, of runs oldest first; gives the files written. Raises OSError where it can't."""
    wanted = (
        (html, lambda: page(runs, comparison)),
        (markdown, lambda: text.markdown(runs, comparison)),
        (csv, lambda: frame(runs).to_csv(index=False)),
    )
    written = [(Path(path), make) for path, make in wanted if path is not None]
    for path, make in written:
        path.write_text(make(), encoding="utf-8")
    return [path for path, _ in written]
