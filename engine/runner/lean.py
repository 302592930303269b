"""A decoder layer in few passes over memory and few calls, for layers that are built like Llama's.

Two RMS norms, rotary attention with or without a norm of queries and keys, and a gated MLP: what Llama, Mistral, Qwen2,
Qwen3 and SmolLM2 are made of. It computes the same function with the constants folded into the weights: the norms'
scales and the softmax scale. Whether a model's layers really compute this is found by comparing logits, not by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.attention.paged import Options, PackedStep
from engine.compiled import Function, compiled
from engine.runner.linear import Product, product_of

LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class Rotate:
    """From the product of rows that were not normed to the queries, keys and values of attention.

    A norm divides a row by one number, and so does it to the row's products: that can wait until they are read anyway.
    `head_eps` is the epsilon of the norms of queries and keys, None without.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    head_eps: float | None
    biased: bool

    def __call__(
        self, x_TM: torch.Tensor, product_TN: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor,
        *constants: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """[T, H, D] and twice [T, K, D]; the constants are the bias [N] and the weights of the heads' norms [H + K, D],
        as far as there are any."""
        heads_THD = product_TN * normer(x_TM, self.eps)
        if self.biased:
            heads_THD = heads_THD + constants[0]
        heads_THD = heads_THD.unflatten(1, (-1, self.head_dim))
        qk_THD, v_TKD = heads_THD.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.head_eps is not None:
            qk_THD = qk_THD * normer(qk_THD, self.head_eps) * constants[-1]
        a_THE, b_THE = qk_THD.chunk(2, -1)  # dimension i and i + D/2 are a point of a plane, turned by an angle
        qk_THD = torch.cat([a_THE * cos_T1E - b_THE * sin_T1E, b_THE * cos_T1E + a_THE * sin_T1E], -1)
        return qk_THD[:, : self.heads].clone(), qk_THD[:, self.heads :].clone(), v_TKD.clone()


@dataclass(frozen=True)
class Gate:
    """From the product of rows that were not normed, gates beside values, to what goes into the last product."""

    activation: nn.Module
    eps: float
    biased: bool

    def __call__(self, x_TM: torch.Tensor, product_TN: torch.Tensor, *bias_N: torch.Tensor) -> tuple[torch.Tensor]:
        """[T, N / 2]."""
        both_TN = product_TN * normer(x_TM, self.eps)
        if self.biased:
            both_TN = both_TN + bias_N[0]
        gate_TF, up_TF = both_TN.chunk(2, -1)
        return (self.activation(gate_TF) * up_TF,)


def normer(x: torch.Tensor, eps: float) -> torch.Tensor:
    """What an RMS norm multiplies the last dimension by, 1 / sqrt(mean(x^2) + eps)."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


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
        (first_M, eps), (second_M, mlp_eps) = map(_constants, (layer.input_layernorm, layer.post_attention_layernorm))
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.width, self.head_dim = q.in_features, attention.head_dim
        heads, kv_heads = (part.out_features // attention.head_dim for part in (q, k))
        query_scale, head_eps = options.scale, None
        self.constants: list[torch.Tensor] = []
        if hasattr(attention, "q_norm"):  # what follows it, the softmax scale, goes into its weight
            (q_D, head_eps), (k_D, _) = _constants(attention.q_norm), _constants(attention.k_norm)
            self.constants = [torch.cat([(q_D * options.scale).expand(heads, -1), k_D.expand(kv_heads, -1)])]
            query_scale = 1.0
        if q.bias is not None:
            self.constants.insert(0, torch.cat([q.bias.data * query_scale, k.bias.data, v.bias.data]))
        weight = torch.cat([q.weight.data * query_scale, k.weight.data, v.weight.data]) * first_M
        self.qkv = Product([weight], [], tiled)
        gate, up = mlp.gate_proj, mlp.up_proj
        self.gate_up = Product([torch.cat([gate.weight.data, up.weight.data]) * second_M], [], tiled)
        self.mlp_bias = [torch.cat([gate.bias.data, up.bias.data])] if gate.bias is not None else []
        self.out, self.down = (product_of([layer], tiled) for layer in (attention.o_proj, mlp.down_proj))
        self.rotate: Function = Rotate(heads, kv_heads, attention.head_dim, eps, head_eps, q.bias is not None)
        self.gated: Function = Gate(mlp.act_fn, mlp_eps, gate.bias is not None)

    def compile_for(self, known: dict[str, Function]) -> None:
        """Compile what lies between the products, unless it is known from a layer before."""
        rows = 32
        x_TM, angle_T1E = torch.zeros(rows, self.width), torch.zeros(rows, 1, self.head_dim // 2)
        qkv_TN, both_TN = (torch.zeros(rows, *product.sizes) for product in (self.qkv, self.gate_up))
        self.rotate = _known(known, self.rotate, (x_TM, qkv_TN, angle_T1E, angle_T1E), self.constants)
        self.gated = _known(known, self.gated, (x_TM, both_TN), self.mlp_bias)

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
        q_THD, k_TKD, v_TKD = self.rotate(x_TM, self.qkv(x_TM), *packed.rotation(*position_embeddings), *self.constants)
        mixed_THD = packed.attend(self.index, q_THD, k_TKD, v_TKD, self.options)
        x_TM = self.out(mixed_THD.flatten(1), x_TM)
        (inner_TF,) = self.gated(x_TM, self.gate_up(x_TM), *self.mlp_bias)
        return self.down(inner_TF, x_TM)[None]


def lean(model: PreTrainedModel, options: dict[int, Options], tiled: bool, compile: bool) -> list[Product]:
    """Put lean layers into `model` where all of its layers can be; gives their products, or none.

    `compile`: also what lies between the products; the first time on a machine that takes some seconds.
    """
    layers: Any = getattr(model.base_model, "layers", ())
    if not all(index in options and is_lean(layer, options[index]) for index, layer in enumerate(layers)):
        return []
    known: dict[str, Function] = {}
    for index, layer in enumerate(layers):
        layers[index] = LeanLayer(layer, index, options[index], tiled)
        if compile:
            layers[index].compile_for(known)
    return [product for index in range(len(layers)) for product in layers[index].products]


def _known(
    known: dict[str, Function], function: Function, rows: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]
) -> Function:
    """A function of rows and constants, compiled once for all layers."""
    if repr(function) not in known:
        dynamic, key = [(0,)] * len(rows) + [()] * len(constants), inspect.getsource(normer)
        known[repr(function)] = compiled(function, [*rows, *constants], dynamic, key)
    return known[repr(function)]


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
