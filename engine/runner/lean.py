"""A decoder layer in few passes over memory and few calls, for layers that are built like Llama's.

Two RMS norms, rotary attention with or without a norm of queries and keys, and a gated MLP: what Llama, Mistral, Qwen2,
Qwen3 and SmolLM2 are made of. It computes the same function with the constants folded into the weights: the norms'
scales and the softmax scale. Whether a model's layers really compute this is found by comparing logits, not by name.
"""

from __future__ import annotations

from collections.abc import Set
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.attention import rows
from engine.attention.paged import Options, PackedStep, Store
from engine.compiled import Compiled, Compiler, like
from engine.runner.formulas import Gate, Layer, Rotate, Turn
from engine.runner.linear import Product, product_of
from engine.runner.ways import FEW

LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PACKED, PANELS = "packed", "panels"  # copies of weights that a compiled layer multiplies by


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
        rotate = Rotate(heads, kv_heads, attention.head_dim, eps, head_eps, q.bias is not None)
        # Transformers' own SiLU is torch's; torch's is there without importing Transformers.
        activation = nn.SiLU() if isinstance(mlp.act_fn, SiLUActivation) else mlp.act_fn
        self.rotate, self.gate = rotate, Gate(activation, mlp_eps, gate.bias is not None)
        self.turn: Compiled | None = None
        self.wholes: dict[str, tuple[Compiled, list[torch.Tensor]]] = {}  # PACKED and PANELS, each with its weights
        self.most = 0  # rows that go through PANELS
        self.last = False  # nothing reads the results of tokens whose logits nobody wants

    def compile_with(self, compiler: Compiler, store: Store) -> None:
        """Have attention compiled for stores like this one, and the whole layer if its products can be part of that."""
        count, fixed, free = 32, (), (0,)
        x_TM, angles = like(count, self.width), [like(count, 1, self.head_dim // 2)] * 2
        product_TN, tokens_R = like(count, sum(self.qkv.sizes)), like(count // 2, dtype=torch.long)
        pages, sizes = rows.example(count // 2, store.keys_LKDP, store.values_LKBPE)
        tensors = [x_TM, product_TN, *angles, tokens_R, *pages, *self.constants]
        self.turn = compiler.add(Turn(self.rotate), tensors, [free] * 5 + sizes + [fixed] * len(self.constants))
        if self.out.bias is not None or self.down.bias is not None:
            return
        pages, sizes = rows.example(count, store.keys_LKDP, store.values_LKBPE)
        constants, x_BRM = [*self.constants, *self.mlp_bias], like(count // FEW, FEW, self.width)
        dynamic = [free] * 3 + [fixed] * 4 + sizes + [fixed] * len(constants)
        for name in (PACKED, PANELS):
            weights = [weight for product in self.products if (weight := getattr(product, name)) is not None]
            if len(weights) == len(self.products):
                shown = [like(*weight.shape) for weight in weights]
                tensors = [x_BRM, *angles, *shown, *pages, *constants]
                layer = Layer(self.rotate, self.gate, name == PANELS)
                self.wholes[name] = compiler.add(layer, tensors, dynamic), weights

    @property
    def two_ways(self) -> bool:
        """Whether it can be computed as a whole by PACKED and by PANELS."""
        return len(self.wholes) == 2 and all(whole.built for whole, _ in self.wholes.values())

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
        """[1, T, M] -> [1, T, M], or [1, R, M] if it is the last and no more are wanted."""
        x_TM, rotation = hidden_states[0], packed.rotation(*position_embeddings)
        wanted_R = packed.wanted_R if self.last else None
        whole, weights = self.wholes.get(PANELS if len(x_TM) <= self.most else PACKED, (None, []))
        if whole is not None and whole.built and wanted_R is None and not packed.chunks:
            pages = packed.pages(self.index, self.options.window)
            x_BRM = x_TM.unflatten(0, (-1, FEW))
            return whole(x_BRM, *rotation, *weights, *pages, *self.constants, *self.mlp_bias)[0].flatten(0, 1)[None]
        product_TN = self.qkv(x_TM)
        if self.turn is not None and self.turn.built:
            tensors = packed.tokens_R, *packed.pages(self.index, self.options.window), *self.constants
            q_THD, k_TKD, v_TKD, out_RHD = self.turn(x_TM, product_TN, *rotation, *tensors)
            mixed_THD = packed.attend_chunks(self.index, q_THD, k_TKD, v_TKD, self.options, out_RHD)
        else:
            q_THD, k_TKD, v_TKD = self.rotate(x_TM, product_TN, *rotation, *self.constants)
            mixed_THD = packed.attend(self.index, q_THD, k_TKD, v_TKD, self.options)
        if wanted_R is not None:
            mixed_THD, x_TM = mixed_THD[wanted_R], x_TM[wanted_R]
        x_TM = self.out(mixed_THD.flatten(1), x_TM)
        (inner_TF,) = self.gate(x_TM, self.gate_up(x_TM), *self.mlp_bias)
        return self.down(inner_TF, x_TM)[None]


def lean(model: PreTrainedModel, options: dict[int, Options], tiled: bool) -> list[LeanLayer]:
    """Put lean layers into `model` where all of its layers can be; gives them, or none."""
    layers: Any = getattr(model.base_model, "layers", ())
    if not all(index in options and is_lean(layer, options[index]) for index, layer in enumerate(layers)):
        return []
    for index, layer in enumerate(layers):
        layers[index] = LeanLayer(layer, index, options[index], tiled)
    layers[-1].last = True
    base = model.base_model
    if _has(base, {"embed_tokens", "layers", "norm", "rotary_emb"}):
        base.forward = MethodType(_through_layers, base)
    return list(layers)


def _through_layers(
    base: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, packed: PackedStep, **kwargs: Any
) -> BaseModelOutputWithPast:
    """What Transformers' loop over the layers comes to where they have no masks, no cache and no hooks."""
    hidden_states = base.embed_tokens(input_ids)
    rotation = base.rotary_emb(hidden_states, position_ids)
    for layer in base.layers:
        hidden_states = layer(hidden_states, position_embeddings=rotation, packed=packed)
    return BaseModelOutputWithPast(last_hidden_state=base.norm(hidden_states))


def leaves_out(model: PreTrainedModel) -> bool:
    """Whether only the tokens that a step wants come out of the last layer."""
    layers: Any = getattr(model.base_model, "layers", None)
    return bool(layers) and isinstance(layers[-1], LeanLayer)


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
