"""How a step is laid out in one array of integers, and CUDA graphs of decode steps, padded to a few sizes.

What a kernel reads of a step lies in that array at places which its sizes alone say, so a graph is replayed
with another step of its sizes by copying the step's array to where the graph reads it. Padding is work of
nobody: rows without a position, which write no key and no value.

T tokens of the step, K tokens whose logits are wanted, R requests of several tokens, X tiles of their work, I
integers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

LOG = logging.getLogger(__name__)


class BatchShape(NamedTuple):
    """Of a step: rows of one token, which come first, and what the others take."""

    rows: int
    tokens: int  # of requests that compute several
    requests: int
    tiles: int
    kept: int  # tokens whose logits are wanted
    bound: int  # no row's context is longer
    greedy: bool

    def parts(self, ints_I: Any) -> list[Any]:
        """The parts of the array, as BatchLayout has them, on the host or the device; each is aligned to 16
        bytes."""
        return [ints_I[begin:end].reshape(shape) for begin, end, shape in places(self)[:-1]]


@lru_cache(4096)
def places(sizes: BatchShape) -> list[tuple[int, int, tuple[int, ...]]]:
    """Where in an array of integers each part begins and ends, and its shape; the last begins where all have
    ended."""
    tokens, requests, at = sizes.rows + sizes.tokens, sizes.requests, 0
    found: list[tuple[int, int, tuple[int, ...]]] = []
    shapes: list[tuple[int, ...]] = [
        (3, tokens),
        (sizes.kept,),
        (requests,),
        (3, requests),
        (sizes.tiles, 2),
        (0,),
    ]
    for shape in shapes:
        size = math.prod(shape)
        found.append((at, at + size, shape))
        at += size + -size % 4
    return found


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """A step's tokens as the host lays them out.

    Args:
        rows: how many of the tokens, the first ones, are rows.
        inputs_3T: ids, positions and lines of the block tables (`step_inputs`).
        keep_K: the tokens whose logits are wanted.
        lines_R, spans_3R, tiles_X2: of requests of several tokens: lines of the tables; where in the step
            their tokens begin and end, and how many precede them; and their work (`attend_chunks`).
    """

    rows: int
    inputs_3T: np.ndarray
    keep_K: np.ndarray
    lines_R: np.ndarray
    spans_3R: np.ndarray
    tiles_X2: np.ndarray

    def sizes(self, greedy: bool) -> BatchShape:
        """Its own, without padding."""
        tokens = self.inputs_3T.shape[1] - self.rows
        bound = int(self.inputs_3T[1, : self.rows].max()) + 1 if self.rows else 1
        return BatchShape(
            self.rows, tokens, len(self.lines_R), len(self.tiles_X2), len(self.keep_K), bound, greedy
        )

    def ints(self, sizes: BatchShape) -> np.ndarray:
        """The array, int32 [I], of these sizes: its own, or with more rows where nothing but rows is in
        it."""
        ints_I = np.zeros(places(sizes)[-1][0], dtype=np.int32)
        inputs_3T, keep_K, lines_R, spans_3R, tiles_X2 = sizes.parts(ints_I)
        inputs_3T[1] = -1
        inputs_3T[:, : self.inputs_3T.shape[1]] = self.inputs_3T
        keep_K[: len(self.keep_K)] = self.keep_K
        lines_R[:], spans_3R[:], tiles_X2[:] = self.lines_R, self.spans_3R, self.tiles_X2
        return ints_I


EMPTY = BatchLayout(0, *(np.zeros(shape, dtype=np.int32) for shape in ((3, 0), (0,), (0,), (3, 0), (0, 2))))


def upload(ints_I: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of integers on the device as int32, without waiting for it."""
    return pinned(ints_I, device).to(device, non_blocking=True)


def pinned(ints_I: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of integers as int32, in memory that a GPU reads by itself; torch keeps it until that is
    done."""
    tensor = torch.from_numpy(np.ascontiguousarray(ints_I, dtype=np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


class CudaGraphs:
    """Captured steps, one for each of their sizes; on a CPU the same steps, computed.

    Args:
        compute: a step, from its sizes and its array; gives logits, or None.
        state: what `compute` writes and the next step reads.
    """

    def __init__(
        self, compute: Callable[[BatchShape, torch.Tensor], torch.Tensor | None], state: torch.Tensor
    ) -> None:
        self._compute, self._state, self._device = compute, state, state.device
        self.known: dict[BatchShape, tuple[torch.Tensor, Callable[[], torch.Tensor | None]]] = {}
        cuda = self._device.type == "cuda"
        # One stream and one pool for all captures, or each would keep a workspace of cuBLAS and memory of its
        # own.
        self._side: Any = torch.cuda.Stream(self._device) if cuda else None
        self._memory: Any = torch.cuda.graph_pool_handle() if cuda else None

    def run(self, sizes: BatchShape, step: BatchLayout) -> torch.Tensor | None:
        """Compute a step that is padded to these sizes, capturing it first if none has been."""
        if sizes not in self.known:
            self.known[sizes] = self._captured(sizes)
        ints_I, replay = self.known[sizes]
        ints_I.copy_(pinned(step.ints(sizes), self._device), non_blocking=True)
        return replay()

    def _captured(self, sizes: BatchShape) -> tuple[torch.Tensor, Callable[[], torch.Tensor | None]]:
        """Where its graph reads a step's array, and what replays it."""
        started, kept = time.perf_counter(), self._state.clone()
        ints_I = upload(EMPTY.ints(sizes), self._device)

        def compute() -> torch.Tensor | None:
            return self._compute(sizes, ints_I)

        if self._device.type != "cuda":
            return ints_I, compute
        self._side.wait_stream(torch.cuda.current_stream())
        # compiles kernels and makes libraries' workspaces, which a capture may not
        with torch.cuda.stream(self._side):
            compute()
        torch.cuda.current_stream().wait_stream(self._side)
        self._state.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._memory, self._side, capture_error_mode="thread_local"):
            logits_KV = compute()
        LOG.info("captured %s in %.2f s", sizes, time.perf_counter() - started)

        def replay() -> torch.Tensor | None:
            graph.replay()
            return logits_KV

        return ints_I, replay
