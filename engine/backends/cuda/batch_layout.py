"""How a batch is laid out for a GPU: one array of integers, whose parts lie where its sizes alone say.

A graph is replayed with another batch of its sizes by copying that batch's array to where the graph reads it.
Requests of one token, rows, come first. Padding is work of nobody: rows without a position, which write no
key and no value.

T tokens of the batch, K tokens whose logits are wanted, J requests, R of them with several tokens, X tiles of
their work, I integers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.step import PENDING, Batch

MIN_BOUND = 1024  # least context that a graph's grid is made for; more in powers of four


class BatchShape(NamedTuple):
    """Sizes of a batch: rows of one token, which come first, and what the others take."""

    rows: int
    tokens: int  # of requests that compute several
    requests: int
    tiles: int
    kept: int  # tokens whose logits are wanted
    bound: int  # no row's context is longer
    greedy: bool

    def parts(self, ints_I: Any) -> list[Any]:
        """Return the parts of the array, as BatchLayout has them, on the host or the device."""
        return [ints_I[begin:end].reshape(shape) for begin, end, shape in _places(self)[:-1]]

    def padded(self, most: int) -> BatchShape:
        """Return the shape of the graph for a batch of rows: more of them, and a longer bound of their
        contexts.

        Args:
            most: positions of a context.
        """
        bound = MIN_BOUND
        while bound < min(self.bound, most):
            bound *= 4
        rows = bucket(self.rows)
        return self._replace(rows=rows, kept=rows, bound=min(bound, most))


def bucket(rows: int) -> int:
    """Return how many rows the graph for `rows` rows has: the next power of two, multiple of 8, or (beyond
    160) of 16."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    unit = 8 if rows <= 160 else 16
    return -(-rows // unit) * unit


@lru_cache(4096)
def _places(shape: BatchShape) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return where in the array each part begins and ends, aligned to 16 bytes, and its shape; the last is
    its end."""
    tokens, requests, at = shape.rows + shape.tokens, shape.requests, 0
    parts: list[tuple[int, ...]] = [
        (3, tokens),
        (shape.kept,),
        (requests,),
        (3, requests),
        (shape.tiles, 2),
        (0,),
    ]
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for part in parts:
        size = math.prod(part)
        found.append((at, at + size, part))
        at += size + -size % 4
    return found


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """A batch's tokens as the host lays them out.

    Args:
        rows: how many of the tokens, the first ones, are rows.
        inputs_3T: ids, positions and lines of the block tables (`step_inputs`).
        keep_K: the tokens whose logits are computed.
        lines_R, spans_3R, tiles_W2: of requests of several tokens: lines of the tables; where their tokens
            begin and end, and how many precede them; and their work (`attend_chunks`).
        order_T: the place of each token in the batch.
        wanted: where among keep_K each wanted token of the batch is.
    """

    rows: int
    inputs_3T: np.ndarray
    keep_K: np.ndarray
    lines_R: np.ndarray
    spans_3R: np.ndarray
    tiles_W2: np.ndarray
    order_T: np.ndarray
    wanted: list[int]

    @property
    def is_decode(self) -> bool:
        """Whether all of its tokens are rows, and each one's logits are computed."""
        return self.inputs_3T.shape[1] == self.rows == len(self.keep_K)

    def shape(self, greedy: bool) -> BatchShape:
        """Return its own sizes, without padding."""
        tokens = self.inputs_3T.shape[1] - self.rows
        bound = int(self.inputs_3T[1, : self.rows].max()) + 1 if self.rows else 1
        counts = len(self.lines_R), len(self.tiles_W2), len(self.keep_K)
        return BatchShape(self.rows, tokens, *counts, bound, greedy)

    def ints(self, shape: BatchShape) -> np.ndarray:
        """Return the array, int32 [I], of these sizes: its own, or with more rows where all are rows."""
        ints_I = empty_rows(shape)
        inputs_3T, keep_K, lines_R, spans_3R, tiles_W2 = shape.parts(ints_I)
        inputs_3T[:, : self.inputs_3T.shape[1]] = self.inputs_3T
        keep_K[: len(self.keep_K)] = self.keep_K
        lines_R[:], spans_3R[:], tiles_W2[:] = self.lines_R, self.spans_3R, self.tiles_W2
        return ints_I


def lay_out(
    batch: Batch, lines_J: np.ndarray, pending: Mapping[Hashable, int], tile: int, one_by_one: bool = False
) -> BatchLayout:
    """Return the layout of a batch: rows first, then the other requests in the order in which they came.

    Args:
        lines_J: of the block tables, a span's each.
        pending: where among the tokens that the batch before has chosen each request's is.
        tile: tokens of a chunk that are attended at a time.
        one_by_one: make every token a row of its own.
    """
    spans, count = batch.spans, len(batch.tokens)
    tokens_T = np.array(batch.tokens)
    ends_J = np.array([span.end for span in spans])
    computed_J = np.array([span.computed for span in spans])
    late_J = np.flatnonzero(tokens_T[ends_J - 1] == PENDING)
    tokens_T[ends_J[late_J] - 1] = [-1 - pending[spans[at].request] for at in late_J.tolist()]
    if count == len(spans):  # rows alone are in order
        all_T, none_30 = np.arange(count), np.zeros((3, 0), dtype=int)
        inputs_3T = np.stack([tokens_T, computed_J, lines_J])
        tiles_02 = _tiles(none_30, tile)
        return BatchLayout(count, inputs_3T, all_T, lines_J[count:], none_30, tiles_02, all_T, batch.wanted)
    counts_J = np.diff(ends_J, prepend=0)
    order_J = np.argsort(counts_J > 1, kind="stable")
    begins_J, counts_J, computed_J, lines_J = np.stack([ends_J - counts_J, counts_J, computed_J, lines_J])[
        :, order_J
    ]
    new_ends_J = counts_J.cumsum()
    # What each token has of its request: where that begins in the batch, how many precede it, and its line.
    own_3T = np.stack([begins_J, computed_J, lines_J]).repeat(counts_J, 1)
    own_3T[:2] += np.arange(count) - (new_ends_J - counts_J).repeat(counts_J)
    order_T = own_3T[0]
    inputs_3T = np.stack([tokens_T[order_T], *own_3T[1:]])
    place_T = np.empty_like(order_T)
    place_T[order_T] = np.arange(count)
    keep_K, wanted = place_T[np.array(batch.wanted, dtype=int)], list(range(len(batch.wanted)))
    # Of rows those of all, so that a graph has no other sizes.
    if count == len(wanted):
        keep_K, wanted = np.arange(count), keep_K.tolist()
    rows = count if one_by_one else int((counts_J == 1).sum())
    several = slice(len(lines_J) if one_by_one else rows, None)
    spans_3R = np.stack([new_ends_J - counts_J, new_ends_J, computed_J])[:, several]
    return BatchLayout(
        rows, inputs_3T, keep_K, lines_J[several], spans_3R, _tiles(spans_3R, tile), order_T, wanted
    )


def _tiles(spans_3R: np.ndarray, size: int) -> np.ndarray:
    """Return (request, first token) of every tile of `size` tokens, [X, 2], that with the longest past
    first."""
    begins_R, ends_R, computed_R = spans_3R
    first = [np.arange(begin, end, size) for begin, end in zip(begins_R, ends_R, strict=True)]
    if not first:
        return np.zeros((0, 2), dtype=int)
    request_X = np.repeat(np.arange(len(first)), [len(tokens) for tokens in first])
    first_X = np.concatenate(first)
    longest_first_X = np.argsort((begins_R - computed_R)[request_X] - first_X, kind="stable")
    return np.stack([request_X, first_X], 1)[longest_first_X]


def empty_rows(shape: BatchShape) -> np.ndarray:
    """Return the array of a batch of rows of nobody."""
    ints_I = np.zeros(_places(shape)[-1][0], dtype=np.int32)
    shape.parts(ints_I)[0][1] = -1
    return ints_I


def upload(ints_I: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array of integers on the device as int32, without waiting for it."""
    return pinned(ints_I, device).to(device, non_blocking=True)


def pinned(ints_I: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array of integers as int32, in memory that a GPU reads by itself; torch keeps it until that
    is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(ints_I, dtype=np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor
