"""Block tables that stay on the device: a line a request, brought up to date with one copy a step.

R requests, N page ids of a line, X entries that are new.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from engine.backends.cuda.batch_layout import upload
from engine.step import Span


class BlockTables:
    """The pages of requests, in lines of `tables_RN`.

    Args:
        rows: requests that share a batch, at most. columns: pages of a request, at most.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.tables_RN = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self._lines: dict[Hashable, int] = {}
        self._free = list(range(rows))[::-1]
        # Of each line: the pages of its request, how many of them the device has, the last batch it was in.
        self._pages: list[list[int]] = [[]] * rows
        self._written = [0] * rows
        self._used_R = np.zeros(rows, dtype=int)
        self._batches = 0

    def update(self, spans: Sequence[Span]) -> np.ndarray:
        """Return the line of each span's request, [J], with all of its pages in it on the device.

        Nothing counts as written before it is: if that fails, the next batch writes it.
        """
        lines = self._lines_of(spans)
        pages, written = self._pages, self._written
        stale: list[int] = []
        for line, span in zip(lines, spans, strict=True):
            if pages[line] is not span.pages:  # after a preemption a request has other pages, in another list
                pages[line], written[line] = span.pages, 0
            if written[line] < len(span.pages):
                stale.append(line)
        if stale:
            fresh = [
                (line, at, pages[line][at]) for line in stale for at in range(written[line], len(pages[line]))
            ]
            line_X, column_X, page_X = upload(np.array(fresh).T, self.tables_RN.device)
            self.tables_RN[line_X, column_X] = page_X
        for line in stale:
            written[line] = len(pages[line])
        return np.array(lines)

    def _lines_of(self, spans: Sequence[Span]) -> list[int]:
        """Return the line of each span's request.

        A new one gets a free line, or else that of the request which was in no batch for the longest time.
        """
        self._batches += 1
        known = [self._lines.get(span.request, -1) for span in spans]
        if -1 not in known:
            self._used_R[known] = self._batches
            return known
        self._used_R[[line for line in known if line >= 0]] = self._batches
        for request in [span.request for line, span in zip(known, spans, strict=True) if line < 0]:
            if not self._free:
                oldest = min(self._lines, key=lambda other: self._used_R[self._lines[other]])
                self._free.append(self._lines.pop(oldest))
            line = self._lines[request] = self._free.pop()
            self._pages[line], self._used_R[line] = [], self._batches
        return [self._lines[span.request] for span in spans]
