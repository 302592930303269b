"""What attention needs to know of a step on a GPU: tensors that stay there, and the kernels that read them.

Nothing in here may wait for the device or look at a value on it: this runs while a CUDA graph is captured.

T tokens of the step, B rows of one token (they come first), R requests with chunks, X tiles, H query heads, K
KV heads, D head size, E rotated part of it, L pages, P page size, N page ids of a block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.models.attention_trace import Options

# attended at a time, for each takes up to MAX_SPLITS partial results: prefill by rows has thousands
ROWS = 512


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What a layer's attention needs to know of a step, all of it on the device; the model hands it on.

    `max_length` bounds lengths_B, and `split` is how finely a row is cut, as in `attend_rows`. `chunks` are
    the requests that compute several tokens, as `attend_chunks` wants them: tables_RN, begins_R, ends_R,
    computed_R, tiles_X2.
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
    chunks: tuple[torch.Tensor, ...] | None

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        options: Options,
        angles_2TE: tuple[torch.Tensor, torch.Tensor] | None = None,
        bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values into their pages and attend; gives [T, H, D].

        Queries are scaled and they and keys are rotated already; with cosines and sines, neither is. With
        these, all three may also be partial sums, [S, T, H or K, D], that lack a bias (`write_pages`).
        """
        store, scale = (self.keys_LKPD[layer], self.values_LKPD[layer]), 1.0
        if angles_2TE is None:
            self.kernels.write_pages(k_TKD, v_TKD, self.slots_T, *store)
        else:
            q_THD = self.kernels.write_pages(k_TKD, v_TKD, self.slots_T, *store, (q_THD, *angles_2TE), bias_N)
            scale = options.scale
        how = scale, options.window, options.softcap, options.sink_H
        out_THD = q_THD.new_empty(q_THD.shape)
        for at in range(0, len(self.lengths_B), ROWS):
            some = slice(at, min(at + ROWS, len(self.lengths_B)))
            self.kernels.attend_rows(
                q_THD[some], *store, self.tables_RN, self.lengths_B[some], self.max_length, *how,
                self.lines_B[some], self.split, out_THD[some],
            )  # fmt: skip
        if self.chunks is not None:
            self.kernels.attend_chunks(q_THD, *store, *self.chunks, *how, out_THD)
        return out_THD
