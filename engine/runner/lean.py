"""A decoder layer in few passes over memory and few calls, for layers that are built like Llama's.

Two RMS norms, rotary attention with or without a norm of queries and keys, and a gated MLP: what Llama, Mistral, Qwen2,
Qwen3 and SmolLM2 are made of. It computes the same function with the constants folded into the weights: the norms'
scales and the softmax scale. Whether a model's layers really compute this is found by comparing logits, not by name.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.attention.paged import Options, PackedStep
from engine.runner.linear import Product, product_of

LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class LeanLayer(nn.Module):
    """Takes the place of a decoder layer in a packed model.

    Args:
        layer: a layer that `is_lean`. It is not changed.
        index: which one it is.
        options: of its attention, as the model's own code passes them.
        tiled: as for Product.
    """

    def __init__(self, layer: Any, index: int, options: Options, tiled: bool) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.options = index, options
        self.head_dim = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.activation = mlp.act_fn
        self.norms = [_constants(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        (first, _), (second, _) = self.norms
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        query_scale = options.scale
        self.qk_norms: tuple[torch.Tensor, float] | None = None  # weights [H + K, D], epsilon
        if hasattr(attention, "q_norm"):  # what follows it, the softmax scale, goes into its weight
            (q_D, eps), (k_D, _) = _constants(attention.q_norm), _constants(attention.k_norm)
            weights = [(q_D * options.scale).expand(self.heads, -1), k_D.expand(self.kv_heads, -1)]
            self.qk_norms, query_scale = (torch.cat(weights), eps), 1.0
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        weight = torch.cat([q.weight.data * query_scale, k.weight.data, v.weight.data]) * first
        bias = [q.bias.data * query_scale, k.bias, v.bias] if q.bias is not None else []
        self.qkv = Product([weight], bias, tiled)
        gated = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data]) * second
        both = [mlp.gate_proj.bias, mlp.up_proj.bias] if mlp.gate_proj.bias is not None else []
        self.gate_up = Product([gated], both, tiled)
        self.out, self.down = (product_of([layer], tiled) for layer in (attention.o_proj, mlp.down_proj))

    @property
    def products(self) -> list[Product]:
        """Its matrix products, to be prepared."""
        return [self.qkv, self.out, self.gate_up, self.down]

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: PackedStep,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[1, T, M] -> [1, T, M]."""
        x_TM = hidden_states[0]
        tokens, (_, eps) = len(x_TM), self.norms[0]
        heads_THD = self.qkv(_normed(x_TM, eps)).view(tokens, -1, self.head_dim)
        qk_THD, v_TKD = heads_THD.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.qk_norms is not None:
            weight_HD, head_eps = self.qk_norms
            qk_THD = _normed(qk_THD, head_eps).mul_(weight_HD)
        q_THD, k_TKD = _rotated(qk_THD, *packed.rotation(*position_embeddings)).split((self.heads, self.kv_heads), 1)
        mixed_THD = packed.attend(self.index, q_THD, k_TKD, v_TKD, self.options)
        x_TM = self.out(mixed_THD.flatten(1)).add_(x_TM)
        _, eps = self.norms[1]
        gate_TF, up_TF = self.gate_up(_normed(x_TM, eps)).chunk(2, -1)
        return self.down(self.activation(gate_TF).mul_(up_TF)).add_(x_TM)[None]


def lean(model: PreTrainedModel, options: dict[int, Options], tiled: bool) -> list[Product]:
    """Put lean layers into `model` where all of its layers can be; gives their products, or none."""
    layers: Any = getattr(model.base_model, "layers", ())
    if not all(index in options and is_lean(layer, options[index]) for index, layer in enumerate(layers)):
        return []
    for index, layer in enumerate(layers):
        layers[index] = LeanLayer(layer, index, options[index], tiled)
    return [product for index in range(len(layers)) for product in layers[index].products]


def is_lean(layer: Any, options: Options) -> bool:
    """Whether a decoder layer has the parts of a lean one and no others, on a CPU in float32."""
    if not _has(layer, LAYER) or not _has(layer.self_attn, ATTENTION, {"q_norm", "k_norm"}) or not _has(layer.mlp, MLP):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    siblings = [[getattr(attention, f"{x}_proj") for x in "qkv"], [mlp.gate_proj, mlp.up_proj]]
    linear = [*siblings[0], *siblings[1], attention.o_proj, mlp.down_proj]
    head_norms = [norm for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if norm]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *head_norms]
    # In float64, Transformers still takes norms in float32.
    return (
        all(type(module) is nn.Linear and module.weight.dtype is torch.float32 for module in linear)
        and linear[0].weight.device.type == "cpu"
        and all(len({module.bias is None for module in several}) == 1 for several in siblings)
        and all(hasattr(norm, "weight") and hasattr(norm, "variance_epsilon") for norm in norms)
        and len(head_norms) in (0, 2)
        and hasattr(attention, "head_dim")
        and all(norm.weight.numel() == attention.head_dim for norm in head_norms)
        and options.softcap is None
        and options.sink_H is None
    )


def _has(module: Any, names: Set[str], perhaps: Set[str] = frozenset()) -> bool:
    children = {name for name, _ in module.named_children()}
    return names <= children <= names | perhaps


def _constants(norm: Any) -> tuple[torch.Tensor, float]:
    """An RMS norm's weight and epsilon."""
    return norm.weight.data, norm.variance_epsilon


def _normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rotated(x_THD: torch.Tensor, cos_T1F: torch.Tensor, sin_T1F: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: dimension i and i + D/2 are a point of a plane, turned by the position's angle."""
    a, b = x_THD.chunk(2, -1)
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos_T1F, out=first).addcmul_(b, sin_T1F, value=-1)
    torch.mul(b, cos_T1F, out=second).addcmul_(a, sin_T1F)
    return out
