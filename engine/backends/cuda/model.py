"""Decoder layers in nine kernels: modules of a packed model replaced where they compute what a fused kernel
does.

A norm is known by its results, not by its name: it is replaced where the kernel gives the same on random
rows. A layer built like Llama's (a norm before attention and one before a gated MLP) or Gemma's (one after
each as well) is replaced as a whole, so that each sum of the residual stream is part of the norm that reads
it; whether the model still computes the same is for the runner to prove.

T tokens of the step, M hidden size, H query heads, K KV heads, D head size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from engine.backends.fused_linear import FusedLinear, FusedOutput
from engine.models.attention_trace import LayerAttention, Options
from engine.models.decoder_spec import ACTIVATIONS, ATTENTION, LAYER, MLP

AFTER = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}  # then the one post attention is no MLP's
POSITIONS = 2**18  # of so many at most, cosines and sines are kept: 128 MB with heads of 128
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class FusedNorm(nn.Module):
    """RMSNorm of the last dimension in one kernel; `plus_one` scales by 1 + weight."""

    def __init__(self, weight: torch.Tensor, eps: float, plus_one: bool, kernels: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one, self.kernels = weight, eps, plus_one, kernels

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, summed: bool = False
    ) -> torch.Tensor:
        """[..., M] -> [..., M], of residual + x if there is a residual, which then becomes that sum.

        `summed`: x is [S, T, M], partial sums of a product.
        """
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps, self.plus_one, summed)


class Stream:
    """The residual stream between layers, which Transformers' own loop over layers does not carry.

    `added` is what the last layer adds to x_TM, partial sums of it where `summed`. Steps of up to `few` rows
    take products whose sums are split.
    """

    x_TM: torch.Tensor
    added: torch.Tensor
    summed = False
    few = 0

    def normed(self, norm: nn.Module) -> torch.Tensor:
        """The norm of the stream, [T, M], which then holds what was to be added."""
        return norm(self.added, self.x_TM, self.summed)


class Angles(nn.Module):
    """Cosines and sines of every position, looked up; takes the place of a model's rotary embedding.

    Args:
        rotary: the module. positions: how many. like: of the kind its results shall be.
    """

    def __init__(self, rotary: nn.Module, positions: int, like: torch.Tensor) -> None:
        super().__init__()
        self.rotary, self.like = rotary, like
        self.positions_1P = torch.arange(positions, device=like.device)[None]
        self.tables: dict[str | None, torch.Tensor] = {}

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Two [1, T, E] for positions [1, T], of a kind of layers where a model has several."""
        if layer_type not in self.tables:
            kind = () if layer_type is None else (layer_type,)
            self.tables[layer_type] = torch.cat(self.rotary(self.like, self.positions_1P, *kind), -1)[0]
        return F.embedding(position_ids, self.tables[layer_type]).chunk(2, -1)


class FusedLayer(nn.Module):
    """Takes the place of a decoder layer; leaves in `stream` what is to be added to it, instead of giving the
    sum.

    Args:
        layer: a layer that `is_plain`, its norms FusedNorms and its linear layers Parts of joined products.
        index: which one it is. options: of its attention.
    """

    def __init__(self, layer: Any, index: int, options: Options, stream: Stream, kernels: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.options, self.stream, self.kernels = index, options, stream, kernels
        self.head_dim = attention.head_dim
        before, after = (
            [layer.input_layernorm, layer.post_attention_layernorm],
            [nn.Identity(), nn.Identity()],
        )
        if hasattr(layer, "pre_feedforward_layernorm"):
            before[1], after = layer.pre_feedforward_layernorm, [before[1], layer.post_feedforward_layernorm]
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)  # attention, the MLP
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self.qkv, self.out = attention.q_proj.shared.product, attention.o_proj.shared.product
        self.gate_up, self.down = mlp.gate_proj.shared.product, mlp.down_proj.shared.product
        self.products: tuple[FusedLinear, ...] = self.qkv, self.out, self.gate_up, self.down
        self.heads = [size // self.head_dim for size in self.qkv.sizes]
        self.activation = ACTIVATIONS[type(mlp.act_fn).__name__]

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, position_embeddings: tuple, packed: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[1, T, M], of which the first layer alone reads more than the shape: what a layer adds is in the
        stream."""
        stream, kernels = self.stream, self.kernels
        split_k = hidden_states.shape[1] <= stream.few
        if self.index == 0:
            stream.x_TM = hidden_states[0]
            normed_TM = self.before[0](stream.x_TM)
        else:
            normed_TM = stream.normed(self.before[0])
        bias_N = None
        if split_k and not self.head_norms:
            heads, bias_N = kernels.split_k_product(normed_TM, self.qkv.weights[0]), self.qkv.bias
        else:
            heads = self.qkv(normed_TM)
        q, k, v = heads.unflatten(-1, (-1, self.head_dim)).split(self.heads, -2)
        if self.head_norms:
            q, k = (norm(x) for norm, x in zip(self.head_norms, (q, k), strict=True))
        cos_1TE, sin_1TE = position_embeddings
        mixed_THD = packed.attend(self.index, q, k, v, self.options, (cos_1TE[0], sin_1TE[0]), bias_N)
        self._add(mixed_THD.flatten(1), self.out, self.after[0], split_k)
        normed_TM = stream.normed(self.before[1])
        if split_k:
            active_TI = kernels.split_k_gated(normed_TM, self.gate_up.weights[0], self.activation)
        else:
            active_TI = kernels.gated(*self.gate_up(normed_TM).chunk(2, -1), self.activation)
        self._add(active_TI, self.down, self.after[1], split_k)
        return hidden_states

    def _add(self, x_TM: torch.Tensor, product: FusedLinear, norm: nn.Module, split_k: bool) -> None:
        """Leave a product in the stream, by way of a norm where the model has one there."""
        stream = self.stream
        stream.summed = split_k
        stream.added = self.kernels.split_k_product(x_TM, product.weights[0]) if split_k else product(x_TM)
        if isinstance(norm, FusedNorm):
            stream.added, stream.summed = norm(stream.added, summed=stream.summed), False

    @property
    def can_split_k(self) -> bool:
        """Whether its products may be split: plain weights, none cut into tiles, a bias at attention's inputs
        alone."""
        plain = all(product.weights and not product.tiled for product in self.products)
        return plain and all(product.bias is None for product in self.products[1:])


class LastNorm(nn.Module):
    """The model's last norm, which ends the residual stream."""

    def __init__(self, norm: FusedNorm, stream: Stream) -> None:
        super().__init__()
        self.norm, self.stream = norm, stream

    def forward(self, x_1TM: torch.Tensor) -> torch.Tensor:
        """[1, T, M] -> [1, T, M]."""
        return self.stream.normed(self.norm)[None]


def fuse(
    model: PreTrainedModel, given: Sequence[LayerAttention], kernels: Any, positions: int
) -> tuple[Stream, Callable[[], None]]:
    """Replace each norm of `model` that the kernel equals, and its layers if all are plain; gives what undoes
    it.

    Args:
        given: what each layer's attention takes, as the model's own code passes it.
        kernels: where `add_rms_norm`, `gated` and split products come from.
        positions: that a request may take.
    """
    stream = Stream()
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(module: nn.Module, name: str, by: nn.Module) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, by)

    def undo() -> None:
        for module, name, child in reversed(replaced):
            setattr(module, name, child)

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            norm = _fused_norm(child, kernels)
            if norm is not None:
                replace(module, name, norm)
    layers, last = getattr(model.base_model, "layers", None), getattr(model.base_model, "norm", None)
    rotated = all(layer.only_rotates and layer.source == index for index, layer in enumerate(given))
    if (
        isinstance(layers, nn.ModuleList)
        and isinstance(last, FusedNorm)
        and rotated
        and all(map(is_plain, layers))
    ):
        fused = [FusedLayer(layer, i, given[i].options, stream, kernels) for i, layer in enumerate(layers)]
        for layer in fused:
            replace(layers, str(layer.index), layer)
        replace(model.base_model, "norm", LastNorm(last, stream))
        if all(layer.can_split_k for layer in fused):
            stream.few = kernels.few_rows(
                model.dtype, sum(w.nbytes for p in fused[0].products for w in p.weights)
            )
        rotary = getattr(model.base_model, "rotary_emb", None)
        if rotary is not None and positions <= POSITIONS:
            replace(model.base_model, "rotary_emb", Angles(rotary, positions, last.weight))
    return stream, undo


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer has the parts of Llama's, or Gemma's, and no others, each of a kind that can be
    fused."""
    children = {name: dict(module.named_children()) for name, module in layer.named_children()}
    if set(children) not in (LAYER, LAYER | AFTER) or set(children["mlp"]) != MLP:
        return False
    attention, mlp = children["self_attn"], children["mlp"]
    norms = [getattr(layer, name) for name in children if "norm" in name]
    norms += [attention[name] for name in attention.keys() - ATTENTION]
    parts = [module for name, module in (*attention.items(), *mlp.items()) if name.endswith("_proj")]
    return (
        set(attention) in (ATTENTION, ATTENTION | {"q_norm", "k_norm"})
        and all(isinstance(norm, FusedNorm) for norm in norms)
        and all(isinstance(part, FusedOutput) for part in parts)
        and len({attention[f"{name}_proj"].shared for name in "qkv"}) == 1
        and mlp["gate_proj"].shared is mlp["up_proj"].shared
        and type(mlp["act_fn"]).__name__ in ACTIVATIONS
    )


def _fused_norm(module: nn.Module, kernels: Any) -> FusedNorm | None:
    """A module's fused equal: one weight vector, one epsilon, and the same results on random rows."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not isinstance(weight, torch.Tensor)
        or weight.dim() != 1
        or not isinstance(eps, float)
        or weight.is_meta
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x_TM = (3 * torch.randn(5, len(weight), generator=generator)).to(weight)
    expected = module(x_TM).double()
    for plus_one in (False, True):
        fused = FusedNorm(weight, eps, plus_one, kernels)
        if float((fused(x_TM).double() - expected).abs().max()) <= CLOSE[weight.dtype] * float(
            expected.abs().max()
        ):
            return fused
    return None
