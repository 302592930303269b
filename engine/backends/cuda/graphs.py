"""CUDA graphs of decode steps, padded to a few sizes.

Launching takes the host longer than most steps of a small model take a GPU (measured beside an H200: 27 ms by
Triton's own launches for 24 layers, whose kernels took 6 ms; `kernels/launch.py` does it for less). So steps
in which every request computes one token are captured. Steps with chunks are not: their sizes hardly ever
come again, and capturing them took `mixed-256` on an H200 from 51,290 to 30,172 tokens/s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.backends.cuda.batch_layout import BatchLayout, BatchShape, empty_rows, pinned, upload

LOG = logging.getLogger(__name__)


class CudaGraphs:
    """Captured batches, one for each of their shapes; on a CPU the same batches, computed.

    Args:
        compute: a batch, from its shape and its array; gives logits, or None.
        state: what `compute` writes and the next batch reads.
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

    def run(self, shape: BatchShape, layout: BatchLayout) -> torch.Tensor | None:
        """Compute a batch that is padded to this shape, capturing it first if none of the shape has been."""
        if shape not in self.known:
            self.known[shape] = self._captured(shape)
        ints_I, replay = self.known[shape]
        ints_I.copy_(pinned(layout.ints(shape), self._device), non_blocking=True)
        return replay()

    def _captured(self, shape: BatchShape) -> tuple[torch.Tensor, Callable[[], torch.Tensor | None]]:
        """Return where its graph reads a batch's array, and what replays it."""
        started, kept = time.perf_counter(), self._state.clone()
        ints_I = upload(empty_rows(shape), self._device)

        def compute() -> torch.Tensor | None:
            return self._compute(shape, ints_I)

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
        LOG.info("captured %s in %.2f s", shape, time.perf_counter() - started)

        def replay() -> torch.Tensor | None:
            graph.replay()
            return logits_KV

        return ints_I, replay
