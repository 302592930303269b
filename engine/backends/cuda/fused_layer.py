"""A layer of a decoder as the kernels take it: products of one input made one, and heads in an order that
rotates by halves.

M width, N outputs of a product, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.models.decoder_parts import Linear, Norm, Rope, head_order
from engine.models.decoder_spec import Layer


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A layer with its products of one input made one.

    Args:
        rope: which of the model's rotates its heads.
        copied_bytes: of weights that are no views of the model's.
    """

    parts: Layer
    qkv: Linear
    gate_up: Linear
    rope: int
    copied_bytes: int

    @property
    def plain_norms(self) -> tuple[Norm, Norm] | None:
        """The norms before attention and before the MLP, if they are RMSNorms and the layer's only ones."""
        parts = self.parts
        first, second = parts.before_attention, parts.before_mlp
        if first is None or second is None or parts.after_attention or parts.after_mlp:
            return None
        plain = not any(norm.centred or norm.bias is not None for norm in (first, second))
        return (first, second) if plain else None


def fuse(layer: Layer, ropes: Sequence[Rope | None], head_dim: int) -> FusedLayer:
    """Return a layer for kernels; weights of products that read the same become views of one."""
    order_D, rope, copied = head_order(layer.rope, head_dim), ropes.index(layer.rope), 0
    if not torch.equal(order_D, torch.arange(len(order_D))):
        layer = reordered(layer, order_D)
        copied = sum(part.weight_NM.nbytes for part in (layer.q, layer.k, layer.v))
    qkv, gate_up = fuse_linears([layer.q, layer.k, layer.v]), fuse_linears([layer.gate, layer.up])
    return FusedLayer(layer, qkv, gate_up, rope, copied)


def reordered(layer: Layer, order_D: torch.Tensor) -> Layer:
    """Return a layer with copies of queries' and keys' weights, and of values', their heads' dimensions in
    another order."""

    def change(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, len(order_D)))[:, order_D].flatten(0, 1)

    def linear(part: Linear) -> Linear:
        return Linear(change(part.weight_NM), None if part.bias_N is None else change(part.bias_N))

    def norm(part: Norm | None) -> Norm | None:
        if part is None:
            return None
        bias = None if part.bias is None else change(part.bias.flatten()).view_as(part.bias)
        return replace(part, scale=change(part.scale.flatten()).view_as(part.scale), bias=bias)

    v = Linear(layer.v.weight_NM.clone(), layer.v.bias_N)
    return replace(
        layer, q=linear(layer.q), k=linear(layer.k), v=v, q_norm=norm(layer.q_norm), k_norm=norm(layer.k_norm)
    )


def fuse_linears(parts: Sequence[Linear]) -> Linear:
    """Return the product of all outputs of several that read the same input, side by side.

    Parameters become views of the joined weight, so that nothing is held twice and the model gives what it
    gave.
    """
    whole_NM = _adjacent([part.weight_NM for part in parts])
    if whole_NM is None:
        whole_NM = torch.cat([part.weight_NM.detach() for part in parts])
        for part, view in zip(parts, whole_NM.split([len(part.weight_NM) for part in parts]), strict=True):
            part.weight_NM.data = view
    biases = [part.bias_N for part in parts if part.bias_N is not None]
    return Linear(whole_NM, torch.cat(biases) if biases else None)


def _adjacent(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the tensor that these are consecutive rows of, or None if there is none."""
    first = tensors[0].detach()
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        apart = tensor.data_ptr() != at or tensor.untyped_storage().data_ptr() != storage
        if apart or not tensor.is_contiguous():
            return None
        at += tensor.nbytes
    rows = sum(map(len, tensors))
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
