"""From a DecoderSpec to the one kind of decoder that is compiled: what others have is folded into weights.

- A norm's scale and bias belong to the products that read it, a softmax scale to the queries, a multiplier to
  the product that it multiplies.
- LayerNorm is RMSNorm of what has a mean of 0. Where all that read the residual stream are LayerNorms, all
  that is added to it is centred: embeddings as they are looked up, the outputs of products by their weights.
- A head is rotated by pairs i and i + D / 2; its dimensions are put into this order (`head_order`).

L layers, M width, N outputs, H query heads, K KV heads, D head size, C panels of W outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from engine.backends.cpu.forward import NO_NORM, Panels, Shape, Weights
from engine.backends.cpu.gemm import WIDE
from engine.backends.zeros import zeros
from engine.models.decoder_parts import head_order
from engine.models.decoder_spec import DecoderSpec, Layer, Linear, Norm, Rope

Part = TypeVar("Part", Linear, Norm)


def shape_of(spec: DecoderSpec, page_size: int) -> Shape:
    """Return the numbers of a model."""
    first, dim = spec.layers[0], spec.head_dim

    def eps(norm: Norm | None) -> float:
        return NO_NORM if norm is None else norm.eps

    return Shape(
        layers=len(spec.layers),
        width=spec.embedding_VM.shape[1],
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=dim,
        inner=len(first.up.weight_NM),
        page=page_size,
        gelu=first.activation == "gelu_tanh",
        parallel=int(spec.parallel),
        whole_norm=spec.has_whole_head_norms,
        centred=spec.norm.centred,
        embedding_scale=spec.embedding_scale,
        logits_softcap=spec.logits_softcap or 0.0,
        eps=eps(first.before_attention),
        mlp_eps=eps(first.before_mlp),
        last_eps=spec.norm.eps,
        head_eps=eps(first.q_norm),
        after_attention_eps=eps(first.after_attention),
        after_mlp_eps=eps(first.after_mlp),
    )


def weights_of(spec: DecoderSpec) -> Weights:
    """Return the weights, with all folded in that can be: copies, but for the embedding.

    Weights of products are in the model's dtype; what is folded into them is so in float32, and rounded once.
    """
    layers, centred, ropes, dtype = spec.layers, spec.norm.centred, spec.ropes, spec.embedding_VM.dtype

    def qkv(layer: Layer) -> list[Linear]:
        scale = 1.0 if layer.q_norm else layer.options.scale
        q, k, v = (_read(layer.before_attention, part) for part in (layer.q, layer.k, layer.v))
        q = _scaled(_heads(q, layer.q_norm, layer.rope, spec.head_dim), scale)
        k = _heads(k, layer.k_norm, layer.rope, spec.head_dim)
        biases = [part.bias_N for part in (q, k, v) if part.bias_N is not None]
        weight_NM = torch.cat([q.weight_NM, k.weight_NM, v.weight_NM])
        return [Linear(weight_NM, torch.cat(biases) if biases else None)]

    def added(part: Linear, after: Norm | None) -> list[Linear]:
        part = _scaled(_wide(part), spec.residual_scale if after is None else 1.0)
        return [_each(lambda x: x - x.mean(0), part) if centred else part]

    def after(norm: Norm | None) -> np.ndarray:
        return _array(None if norm is None else norm.scale * spec.residual_scale, (0,))

    qkv_panels, qkv_bias_LN = _products(layers, dtype, qkv)
    out, out_bias_LM = _products(layers, dtype, lambda layer: added(layer.out, layer.after_attention))
    gate_up, gate_up_bias_LN = _products(
        layers, dtype, lambda layer: [_read(layer.before_mlp, part) for part in (layer.gate, layer.up)]
    )
    down, down_bias_LM = _products(layers, dtype, lambda layer: added(layer.down, layer.after_mlp))
    head, head_bias_LV = _products(
        [spec], dtype, lambda spec: [_scaled(_read(spec.norm, spec.head), spec.logits_scale)]
    )
    return Weights(
        embedding_VM=_numbers(spec.embedding_VM.detach()),
        qkv=qkv_panels,
        out=out,
        gate_up=gate_up,
        down=down,
        head=head,
        qkv_bias_LN=qkv_bias_LN,
        out_bias_LM=out_bias_LM,
        gate_up_bias_LN=gate_up_bias_LN,
        down_bias_LM=down_bias_LM,
        head_bias_LV=head_bias_LV,
        head_norm_LQD=np.stack([_head_norm(layer, spec.head_dim) for layer in layers]),
        after_attention_LM=np.stack([after(layer.after_attention) for layer in layers]),
        after_mlp_LM=np.stack([after(layer.after_mlp) for layer in layers]),
        windows_L=np.array([layer.options.window or 0 for layer in layers], np.int64),
        softcaps_L=np.array([layer.options.softcap or 0 for layer in layers], np.float32),
        ropes_L=np.array([ropes.index(layer.rope) for layer in layers], np.int64),
    )


def filled(size: int) -> int:
    """Return the next multiple of a panel."""
    return -(-size // WIDE) * WIDE


def _each(change: Callable[[torch.Tensor], torch.Tensor], part: Linear) -> Linear:
    """Return a product whose weight [N, M] and bias [N] are changed alike."""
    return Linear(change(part.weight_NM), None if part.bias_N is None else change(part.bias_N))


def _scaled(part: Linear, scale: float) -> Linear:
    return part if scale == 1.0 else _each(lambda x: x * scale, part)


def _read(norm: Norm | None, part: Linear) -> Linear:
    """Return the product that reads what a norm divides by its length, and has the rest of it folded in, in
    float32."""
    part = _wide(part)
    if norm is None:
        return part
    norm = _wide(norm)
    bias_N = part.bias_N
    if norm.bias is not None:
        shift_N = part.weight_NM @ norm.bias
        bias_N = shift_N if bias_N is None else bias_N + shift_N
    return Linear(part.weight_NM * norm.scale, bias_N)


def _heads(part: Linear, norm: Norm | None, rope: Rope | None, dim: int) -> Linear:
    """Return the product that gives heads in the order of `head_order`, centred if their norm is."""
    order_D = head_order(rope, dim)

    def change(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(0, (-1, dim))
        if norm is not None and norm.centred:
            heads = heads - heads.mean(1, keepdim=True)
        return heads[:, order_D].flatten(0, 1)

    return _each(change, part)


def _head_norm(layer: Layer, dim: int) -> np.ndarray:
    """Return what the norms of all heads of queries and keys scale by, [H + K, D], or none."""
    if layer.q_norm is None or layer.k_norm is None:
        return np.empty((0, dim), np.float32)
    q_HD, k_KD = (
        norm.scale.float().reshape(-1, dim).expand(len(part.weight_NM) // dim, dim)
        for norm, part in ((layer.q_norm, layer.q), (layer.k_norm, layer.k))
    )
    both_QD = torch.cat([q_HD * layer.options.scale, k_KD])
    return _array(both_QD[:, head_order(layer.rope, dim)], ())


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [C, W, ...], the last block filled up with zeros."""
    more = (0, 0) * (rows.dim() - 1) + (0, filled(len(rows)) - len(rows))
    return F.pad(rows, more).unflatten(0, (-1, WIDE))


def _products(
    layers: Sequence[Any], dtype: torch.dtype, parts: Callable[[Any], list[Linear]]
) -> tuple[Panels, np.ndarray]:
    """Return the products of each layer as panels [L, C, M, W] and biases [L, C * W], or of no columns.

    Several products of a layer take turns, a panel of each.

    Args:
        dtype: of the panels.
        parts: gives a layer's products, in float32.
    """
    panels, biases = None, []
    for index, layer in enumerate(layers):
        several = parts(layer)
        blocks_CSWM = torch.stack([_blocks(part.weight_NM.detach()) for part in several], 1)
        blocks_CMW = blocks_CSWM.flatten(0, 1).transpose(1, 2)
        if panels is None:
            panels = zeros((len(layers), *blocks_CMW.shape), torch.empty(0, dtype=dtype))
        if panels.dtype is torch.bfloat16:  # in pairs of inner steps
            pairs = blocks_CMW.unflatten(1, (-1, 2)).transpose(2, 3)
            panels[index].view(pairs.shape).copy_(pairs)
        else:
            panels[index].copy_(blocks_CMW)
        some = [_blocks(part.bias_N.detach()) for part in several if part.bias_N is not None]
        biases.append(_array(torch.stack(some, 1).flatten() if some else None, (0,)))
    assert panels is not None
    return Panels(_numbers(panels), np.empty((len(layers), 0, WIDE), np.float32)), np.stack(biases)


def _wide(part: Part) -> Part:
    """Return a product or a norm in float32."""
    tensors: dict[str, Any] = {k: x.float() for k, x in vars(part).items() if isinstance(x, torch.Tensor)}
    return replace(part, **tensors)


def _numbers(x: torch.Tensor) -> np.ndarray:
    """Return an array of a tensor's memory; bfloat16, which NumPy has not, as uint16."""
    return x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()


def _array(x: torch.Tensor | None, empty: tuple[int, ...]) -> np.ndarray:
    return np.empty(empty, np.float32) if x is None else x.detach().float().contiguous().numpy()
