"""Progress of what takes a while, on standard error: a bar on a terminal, in a log a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0  # at most; and none for what takes less
REDRAW_EVERY_S = 0.1


def on_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that can move its cursor: not a log that wishes for colours."""
    if stream is None or stream.closed or not stream.isatty():
        return False
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Progress:
    """How far a piece of work is. Use it as a context, around the work.

    Args:
        what: what is done.
        total: of how many parts, each counted by `advance`; None where only `begin` says what is done.
        unit: what a part is called.
        shown: False shows nothing at all.
        delay_s: a bar appears only for what takes longer, seconds.
        redraw_s: a bar is drawn so often at most, seconds: each time takes some milliseconds of the work's.
        stream: where to; standard error if None.
        clock: gives seconds, of which only differences count.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        unit: str = "",
        shown: bool = True,
        delay_s: float = 0.0,
        redraw_s: float = REDRAW_EVERY_S,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._stream = sys.stderr if stream is None else stream
        self._shown = shown and self._stream is not None
        self._has_bar = self._shown and on_terminal(self._stream)
        self._clock, self._delay_s, self._redraw_s = clock, delay_s, redraw_s
        self._began = self._last = clock()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self._has_bar and not self._delay_s:
            self._draw()
        return self

    def __exit__(self, *error: object) -> None:
        self._shown = False
        self._erase()

    def begin(self, what: str, total: int | None = None, unit: str = "") -> None:
        """Go on to other work, which counts its own parts from 0; a log has no more lines for it."""
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._erase()
        self._show(at_once=True)

    def advance(self, parts: int = 1, what: str | None = None) -> None:
        """Count parts that are done; `what` is how the work is called from now on."""
        self._done += parts
        self._what = self._what if what is None else what
        self._show()

    def write(self, line: str) -> None:
        """Write a line, whether or not anything else is shown, in place of the bar."""
        self._erase()
        if self._stream is not None:
            print(line, file=self._stream, flush=True)

    def _show(self, at_once: bool = False) -> None:
        """Draw the bar, `at_once` or when it is due; in a log, write a line when one is due."""
        now = self._clock()
        if not self._shown or now - self._began < self._delay_s:
            return
        if self._has_bar and (at_once or now - self._last >= self._redraw_s):
            self._last = now
            self._draw()
        elif not self._has_bar and now - self._last >= LINE_EVERY_S:
            self._last = now
            count = "" if self._total is None else f": {self._done:,}/{self._total:,} {self._unit}".rstrip()
            print(f"{self._what}{count}, {now - self._began:,.0f} s", file=self._stream, flush=True)

    def _draw(self) -> None:
        """Draw the bar as it is now."""
        if self._bar is None:
            self._bar = self._new_bar()
        self._bar.update(self._bar.task_ids[0], description=self._what, completed=self._done, refresh=True)

    def _erase(self) -> None:
        """Take the bar from the terminal; the next to be drawn is a new one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _new_bar(self) -> Bar:
        from rich import progress
        from rich.console import Console

        words = progress.TextColumn("{task.description}", markup=False)
        columns: list[progress.ProgressColumn] = [progress.SpinnerColumn(), words]
        if self._total is not None:
            unit, left = progress.TextColumn(self._unit), progress.TimeRemainingColumn()
            columns = [words, progress.BarColumn(), progress.MofNCompleteColumn(), unit, left]
        bar = progress.Progress(
            *columns,
            console=Console(file=self._stream, force_terminal=True),
            transient=True,
            redirect_stdout=False,
            # What is counted is drawn when it changes: a thread that draws would disturb what is measured.
            auto_refresh=self._total is None,
        )
        bar.start()
        bar.add_task(self._what, total=self._total)
        return bar
