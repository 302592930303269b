"""Decoder layers in ten kernels: modules of a packed model replaced where they compute what a fused kernel does.

A norm is known by its results, not by its name: it is replaced where the kernel gives the same on random rows. A layer
built like Llama's (a norm before attention and one before a gated MLP) or Gemma's (one after each as well) is replaced
as a whole, so that each sum of the residual stream is part of the norm that reads it; whether the model still computes
the same is for the runner to prove.

T tokens of the step, M hidden size, H query heads, K KV heads, D head size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.attention.paged import Options
from engine.runner.lean import ATTENTION, LAYER, MLP
from engine.runner.linear import Part

AFTER = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}  # then the one post attention is no MLP's
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


class FusedNorm(nn.Module):
    """RMSNorm of the last dimension in one kernel; `plus_one` scales by 1 + weight."""

    def __init__(self, weight: torch.Tensor, eps: float, plus_one: bool, kernels: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one, self.kernels = weight, eps, plus_one, kernels

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., M] -> [..., M], of residual + x if there is a residual, which then becomes that sum."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps, self.plus_one)


class Stream:
    """The residual stream between layers, which Transformers' own loop over layers does not carry."""

    x_TM: torch.Tensor


class FusedLayer(nn.Module):
    """Takes the place of a decoder layer; gives what is to be added to `stream` instead of the sum.

    Args:
        layer: a layer that `is_plain`, its norms FusedNorms and its linear layers Parts of joined products.
        index: which one it is. options: of its attention.
    """

    def __init__(self, layer: Any, index: int, options: Options, stream: Stream, kernels: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.options, self.stream, self.kernels = index, options, stream, kernels
        self.head_dim = attention.head_dim
        before, after = [layer.input_layernorm, layer.post_attention_layernorm], [nn.Identity(), nn.Identity()]
        if hasattr(layer, "pre_feedforward_layernorm"):
            before[1], after = layer.pre_feedforward_layernorm, [before[1], layer.post_feedforward_layernorm]
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)  # attention, the MLP
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self.qkv, self.out = attention.q_proj.shared.product, attention.o_proj.shared.product
        self.gate_up, self.down = mlp.gate_proj.shared.product, mlp.down_proj.shared.product
        self.heads = [size // self.head_dim for size in self.qkv.sizes]
        self.activation = ACTIVATIONS[type(mlp.act_fn).__name__]

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, position_embeddings: tuple, packed: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[1, T, M] -> [1, T, M]."""
        x_TM, stream = hidden_states[0], self.stream
        if self.index == 0:
            stream.x_TM, normed_TM = x_TM, self.before[0](x_TM)
        else:
            normed_TM = self.before[0](x_TM, stream.x_TM)
        heads_THD = self.qkv(normed_TM).unflatten(-1, (-1, self.head_dim))
        q_THD, k_TKD, v_TKD = heads_THD.split(self.heads, 1)
        if self.head_norms:
            q_THD, k_TKD = (norm(x) for norm, x in zip(self.head_norms, (q_THD, k_TKD), strict=True))
        cos_1TE, sin_1TE = position_embeddings
        mixed_THD = packed.attend(self.index, q_THD, k_TKD, v_TKD, self.options, (cos_1TE[0], sin_1TE[0]))
        normed_TM = self.before[1](self.after[0](self.out(mixed_THD.flatten(1))), stream.x_TM)
        gate_TI, up_TI = self.gate_up(normed_TM).chunk(2, -1)
        return self.after[1](self.down(self.kernels.gated(gate_TI, up_TI, self.activation)))[None]


class LastNorm(nn.Module):
    """The model's last norm, which ends the residual stream."""

    def __init__(self, norm: FusedNorm, stream: Stream) -> None:
        super().__init__()
        self.norm, self.stream = norm, stream

    def forward(self, x_1TM: torch.Tensor) -> torch.Tensor:
        """[1, T, M] -> [1, T, M]."""
        return self.norm(x_1TM[0], self.stream.x_TM)[None]


def fuse(model: PreTrainedModel, options: dict[int, Options], kernels: Any) -> Callable[[], None]:
    """Replace each norm of `model` that the kernel equals, and its layers if all are plain; gives what undoes it.

    Args:
        options: of each layer's attention, as the model passes them.
        kernels: where `add_rms_norm` and `gated` come from.
    """
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
    if isinstance(layers, nn.ModuleList) and isinstance(last, FusedNorm) and all(map(is_plain, layers)):
        stream = Stream()
        for index, layer in enumerate(layers):
            replace(layers, str(index), FusedLayer(layer, index, options[index], stream, kernels))
        replace(model.base_model, "norm", LastNorm(last, stream))
    return undo


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer has the parts of Llama's, or Gemma's, and no others, each of a kind that can be fused."""
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
        and all(isinstance(part, Part) for part in parts)
        and len({attention[f"{name}_proj"].shared for name in "qkv"}) == 1
        and mlp["gate_proj"].shared is mlp["up_proj"].shared
        and type(mlp["act_fn"]).__name__ in ACTIVATIONS
    )


def _fused_norm(module: nn.Module, kernels: Any) -> FusedNorm | None:
    """A module's fused equal: one weight vector, one epsilon, and the same results on random rows."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float) or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    x_TM = (3 * torch.randn(5, len(weight), generator=generator)).to(weight)
    expected = module(x_TM).double()
    for plus_one in (False, True):
        fused = FusedNorm(weight, eps, plus_one, kernels)
        if float((fused(x_TM).double() - expected).abs().max()) <= CLOSE[weight.dtype] * float(expected.abs().max()):
            return fused
    return None
