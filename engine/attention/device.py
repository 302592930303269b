"""What attention needs to know of a step on a GPU: tensors that stay there, and the kernels that read them.

Nothing in here may wait for the device or look at a value on it: this runs while a CUDA graph is captured.

T tokens of the step, B rows of one token (they come first), R requests with chunks, X tiles, H query heads, K KV heads,
D head size, E rotated part of it, L pages, P page size, N page ids of a block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.attention.paged import Options

ROWS = 512  # attended at a time, for each takes up to MAX_SPLITS partial results: prefill by rows has thousands


@dataclass(frozen=True, slots=True)
class Chunks:
    """The requests of a step that compute several tokens each, as `attend_chunks` wants them."""

    tables_RN: torch.Tensor
    begins_R: torch.Tensor
    ends_R: torch.Tensor
    computed_R: torch.Tensor
    tiles_X2: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What a layer's attention needs to know of a step, all of it on the device; the model hands it on.

    `max_length` bounds lengths_B, and `split` is how finely a row is cut, as in `attend_rows`.
    """

    keys_LKPD: list[torch.Tensor]
    values_LKPD: list[torch.Tensor]
    kernels: Any
    slots_T: torch.Tensor
    tables_RN: torch.Tensor
    lengths_B: torch.Tensor
    lines_B: torch.Tensor
    max_length: int
    split: int
    chunks: Chunks | None
    options: dict[int, Options]  # gets those of each layer's attention, as the model passes them

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """Write the step's keys and values into their pages and attend with scaled queries; gives [T, H, D]."""
        self.kernels.write_pages(k_TKD, v_TKD, self.slots_T, self.keys_LKPD[layer], self.values_LKPD[layer])
        return self._attend(layer, q_THD, 1.0, options)

    def attend_rotating(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        angles_2TE: tuple[torch.Tensor, torch.Tensor],
        options: Options,
    ) -> torch.Tensor:
        """As `attend`, but queries and keys are not rotated yet, and queries not scaled."""
        store = self.keys_LKPD[layer], self.values_LKPD[layer]
        q_THD = self.kernels.write_pages(k_TKD, v_TKD, self.slots_T, *store, (q_THD, *angles_2TE))
        return self._attend(layer, q_THD, options.scale, options)

    def _attend(self, layer: int, q_THD: torch.Tensor, scale: float, options: Options) -> torch.Tensor:
        how = scale, options.window, options.softcap, options.sink_H
        store = self.keys_LKPD[layer], self.values_LKPD[layer]
        rows, chunks = len(self.lengths_B), self.chunks
        out_THD = q_THD.new_empty(q_THD.shape)
        for at in range(0, rows, ROWS):
            some = slice(at, min(at + ROWS, rows))
            self.kernels.attend_rows(
                q_THD[some], *store, self.tables_RN, self.lengths_B[some], self.max_length, *how, self.lines_B[some],
                self.split, out_THD[some],
            )  # fmt: skip
        if chunks is not None:
            self.kernels.attend_chunks(
                q_THD, *store, chunks.tables_RN, chunks.begins_R, chunks.ends_R, chunks.computed_R, chunks.tiles_X2,
                *how, out_THD,
            )  # fmt: skip
        return out_THD
