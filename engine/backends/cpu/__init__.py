"""Decoders on a CPU: what their steps compute, compiled once a machine, and kept in the cache folder."""

from __future__ import annotations

import torch

from engine.models.decoder_spec import DecoderSpec

VECTOR = 16  # float32 in the widest vector of a CPU
STEPS = {torch.float32: 2, torch.bfloat16: 4}  # inner steps that a product takes at a time


def can_compile(spec: DecoderSpec) -> bool:
    """Return whether a decoder is one that CompiledDecoder computes.

    It is in float32 or bfloat16 on a CPU, its heads are whole vectors and its other sizes even, in bfloat16
    multiples of 4, and of the norms of the residual stream all are LayerNorms or none.
    """
    layer, inner, dtype = spec.layers[0], len(spec.layers[0].up.weight_NM), spec.embedding_VM.dtype
    before = [layer.before_attention, layer.before_mlp]
    after = [norm for norm in (layer.after_attention, layer.after_mlp) if norm is not None]
    head_norms = [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    centred = spec.norm.centred
    return (
        all(weight.dtype is dtype and weight.device.type == "cpu" for weight in spec.weights)
        and dtype in STEPS
        and layer.activation in ("silu", "gelu_tanh")
        and spec.head_dim % VECTOR == 0
        and spec.embedding_VM.shape[1] % STEPS[dtype] == inner % STEPS[dtype] == 0
        and all(norm.centred == centred if norm is not None else not centred for norm in before)
        and all(norm.bias is None and not norm.centred and not centred for norm in after)
        and all(norm.bias is None for norm in head_norms)
        and all(not norm.centred or norm.scale.shape[-1] == spec.head_dim for norm in head_norms)
        and len(after) in (0, 2)
        and len(head_norms) in (0, 2)
    )
