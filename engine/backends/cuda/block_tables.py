"""Block tables that stay on the device: a line a request, brought up to date with one copy a step.

R requests, N page ids of a line, X entries that are new.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.backends.cuda.batch_layout import upload
from engine.step import Span


class _Line(NamedTuple):
    number: int
    pages: list[int]
    written: int  # pages of them that the device has


class BlockTables:
    """The pages of requests, in lines of `tables_RN`.

    Args:
        rows: requests that share a batch, at most. columns: pages of a request, at most.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.tables_RN = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self._lines: dict[Hashable, _Line] = {}  # the one that was used last comes last
        self._free = list(range(rows))[::-1]

    def update(self, spans: Sequence[Span]) -> np.ndarray:
        """Return the line of each span's request, [J], with all of its pages in it on the device.

        Nothing is remembered before it is written: if that fails, the next batch writes it.
        """
        lines, free = self._lines.copy(), self._free.copy()
        fresh: list[tuple[int, int, int]] = []
        known = [lines.pop(span.request, None) for span in spans]
        for span, old in zip(spans, known, strict=True):
            line = old or _Line(free.pop() if free else _take_oldest(lines), span.pages, 0)
            # After a preemption a request has other pages, in another list.
            written = line.written if line.pages is span.pages else 0
            fresh += [(line.number, at, span.pages[at]) for at in range(written, len(span.pages))]
            lines[span.request] = _Line(line.number, span.pages, len(span.pages))
        if fresh:
            line_X, column_X, page_X = upload(np.array(fresh).T, self.tables_RN.device)
            self.tables_RN[line_X, column_X] = page_X
        self._lines, self._free = lines, free
        return np.array([lines[span.request].number for span in spans])


def _take_oldest(lines: dict[Hashable, _Line]) -> int:
    """Return the line of the request that was in no batch for the longest time; it is forgotten."""
    return lines.pop(next(iter(lines))).number
