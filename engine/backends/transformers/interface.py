"""The attention function that packed steps run through, as Transformers calls it in an unmodified model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from engine.backends.transformers.paged_attention import PagedBatch
from engine.errors import InputError
from engine.models.attention_trace import Options, refuse_options

NAME = "dynamic_batch_packed"  # no mask function is registered for it, so Transformers builds no mask


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    packed: PagedBatch | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a packed step.

    Args:
        query: [1, H, T, D]; key, value: [1, K, T, D]; all rotated already.
        packed: the step, handed to the model as a keyword; its pages get the new keys and values.

    Returns:
        [1, T, H, D], and None for the weights.

    Raises:
        InputError: for a mask or an option that this function would have to ignore.
    """
    refuse_options(module, others)
    if packed is None or attention_mask is not None:
        problem = "does not pass the packed step on" if packed is None else "uses a mask"
        raise InputError(f"{type(module).__name__} {problem}: use runner='padded' for this model")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = Options(scale, sliding_window, softcap, s_aux)
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query * scale, key, value))
    out_THD = packed.attend(module.layer_idx, q_THD, k_TKD, v_TKD, options)  # type: ignore[arg-type]
    return out_THD.unsqueeze(0), None


AttentionInterface.register(NAME, attend)
