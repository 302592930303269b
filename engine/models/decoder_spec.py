"""Which models are built like Llama: two RMS norms a layer, rotary attention, and a gated MLP.

Llama, Mistral, Qwen2, Qwen3 and SmolLM2 are. This looks at the parts alone: whether they compute the same is
found by comparing logits.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.models.attention_trace import LayerAttention

VECTOR = 16  # float32 in the widest vector of a CPU
BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def is_compilable(model: PreTrainedModel, given: Sequence[LayerAttention]) -> bool:
    """Whether a model has these parts and no others, on a CPU in float32.

    Args:
        given: what each layer's attention takes, as the model's own code passes it.
    """
    base, head = model.base_model, model.get_output_embeddings()
    if not _has(base, BASE) or not isinstance(base.layers, nn.ModuleList) or type(head) is not nn.Linear:
        return False
    embedding: Any = base.embed_tokens
    return (
        type(embedding) is nn.Embedding
        and all(
            weight.dtype is torch.float32 and weight.device.type == "cpu"
            for weight in (embedding.weight, head.weight)
        )
        and _is_norm(base.norm)
        and len(given) == len(base.layers)
        and all(_is_compilable_layer(layer, given[index], index) for index, layer in enumerate(base.layers))
    )


def _is_compilable_layer(layer: Any, given: LayerAttention, index: int) -> bool:
    if (
        not _has(layer, LAYER)
        or not _has(layer.self_attn, ATTENTION, {"q_norm", "k_norm"})
        or not _has(layer.mlp, MLP)
    ):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    siblings = [[getattr(attention, f"{x}_proj") for x in "qkv"], [mlp.gate_proj, mlp.up_proj]]
    linear = [*siblings[0], *siblings[1], attention.o_proj, mlp.down_proj]
    head_norms = [
        norm for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if norm
    ]
    head_dim = getattr(attention, "head_dim", 1)
    return (
        all(type(module) is nn.Linear and module.weight.dtype is torch.float32 for module in linear)
        and linear[0].weight.device.type == "cpu"
        and all(len({module.bias is None for module in several}) == 1 for several in siblings)
        and all(map(_is_norm, [layer.input_layernorm, layer.post_attention_layernorm, *head_norms]))
        and len(head_norms) in (0, 2)
        and all(norm.weight.numel() == head_dim for norm in head_norms)
        and head_dim % VECTOR == 0
        and attention.q_proj.in_features % 2 == mlp.gate_proj.out_features % 2 == 0
        and type(mlp.act_fn).__name__ in ACTIVATIONS
        and given.options.softcap is None
        and given.options.sink_H is None
        and given.only_rotates
        and given.source == index
    )


def _is_norm(norm: Any) -> bool:
    return hasattr(norm, "weight") and hasattr(norm, "variance_epsilon")


def _has(module: Any, names: Set[str], perhaps: Set[str] = frozenset()) -> bool:
    children = {name for name, _ in module.named_children()}
    return names <= children <= names | perhaps
