"""Logits to tokens by the `rules`: on the CPU in numpy, a row at a time (`host`); on a device in torch, all
rows at once (`device`), which is imported when it is first used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.request import Request
from engine.sampling.host import sample_each
from engine.step import Choice

if TYPE_CHECKING:
    import torch


def sample(logits_RV: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
    """Choose the next token of each of R requests.

    `logits_RV` are the model's own at each request's last token [R, V], of any float dtype, and are not
    modified. Returns a choice a row. One without a token says why, and its neighbours are not affected.
    """
    if logits_RV.device.type == "cpu":
        wide_RV = logits_RV.float() if logits_RV.itemsize == 2 else logits_RV  # numpy knows no bfloat16
        return sample_each(wide_RV.numpy(), requests)
    from engine.sampling.device import sample_together

    return sample_together(logits_RV, requests)
