"""A decoder as its parts say: read from a Transformers model once, and what the fast backends build from.

No other file knows what Transformers calls the parts. Whether together they compute what the model does is
found by comparing logits (`engine.runner.verify`).

V vocabulary, M width, N outputs, T tokens, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.models.attention_trace import LayerAttention, Options
from engine.models.decoder_parts import (
    Linear,
    Norm,
    OtherPartError,
    Rope,
    activation,
    check,
    embedding_scale,
    linear,
    norm,
    rope_of,
    ropes,
    siblings,
)
from engine.models.geometry import positions, telling_positions

LOG = logging.getLogger(__name__)
BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
# A layer's norms before and after attention, before and after the MLP. post_attention_layernorm has another
# role in one model than in another: the whole set of names decides.
NORM_ROLES: tuple[tuple[str | None, ...], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", None, "input_layernorm", None),  # attention and MLP side by side
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)


@dataclass(frozen=True)
class Layer:
    """A layer: x + after(attention(before(x))), then the same with its gated MLP."""

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    q: Linear
    k: Linear
    v: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    rope: Rope | None
    options: Options  # of attention
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    activation: str


@dataclass(frozen=True)
class DecoderSpec:
    """What a model computes; its layers differ in numbers, options and RoPE alone.

    `parallel`: attention and MLP both read what a layer begins with.
    """

    embedding_VM: torch.Tensor
    embedding_scale: float
    layers: tuple[Layer, ...]
    parallel: bool
    residual_scale: float  # of what attention and MLP add
    norm: Norm
    head: Linear
    logits_scale: float
    logits_softcap: float | None  # logits become softcap * tanh(logits / softcap)
    kv_heads: int
    head_dim: int
    positions: int  # that a request may take

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.layers[0].q.weight_NM) // self.head_dim

    @property
    def ropes(self) -> list[Rope | None]:
        """The ways in which layers rotate, each once."""
        return list(dict.fromkeys(layer.rope for layer in self.layers))

    @property
    def has_whole_head_norms(self) -> bool:
        """Whether queries' heads have one norm together, and keys' heads."""
        norm = self.layers[0].q_norm
        return norm is not None and norm.scale.shape == (self.heads * self.head_dim,) != (self.head_dim,)

    @property
    def weights(self) -> list[torch.Tensor]:
        """Weights of the embedding and of every product."""
        products = [
            part for layer in self.layers for part in vars(layer).values() if isinstance(part, Linear)
        ]
        return [self.embedding_VM, *(part.weight_NM for part in (*products, self.head))]


@torch.no_grad()
def describe(model: PreTrainedModel, given: Sequence[LayerAttention]) -> DecoderSpec | None:
    """Return what a model is made of, or None where a part is none of those that are known here (it is
    logged).

    Args:
        given: what each layer's attention takes, as the model's own code passes it.
    """
    try:
        return _decoder(model, given)
    except OtherPartError as error:
        LOG.info("%s is no decoder that is known here: it has %s", type(model).__name__, error)
        return None


def _decoder(model: PreTrainedModel, given: Sequence[LayerAttention]) -> DecoderSpec:
    base, config = model.base_model, model.config.get_text_config(decoder=True)
    parts: dict[str, Any] = _parts(base)
    check(parts.keys() == BASE, f"other parts than a decoder's: {', '.join(sorted(parts.keys() ^ BASE))}")
    check(isinstance(parts["layers"], nn.ModuleList) and len(given) == len(parts["layers"]), "other layers")
    sizes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in given}
    check(len(sizes) == 1, "layers whose keys and values differ in size")
    known = ropes(parts["rotary_emb"], config, torch.tensor(telling_positions(config), device=model.device))
    layers = tuple(_layer(part, given[i], i, known) for i, part in enumerate(parts["layers"]))
    check(len(set(map(_kind, layers))) == 1, "layers of different kinds")
    return DecoderSpec(
        embedding_VM=parts["embed_tokens"].weight,
        embedding_scale=embedding_scale(parts["embed_tokens"]) * _number(base, "embedding_multiplier"),
        layers=layers,
        parallel=layers[0].before_mlp is layers[0].before_attention is not None,
        residual_scale=_number(parts["layers"][0], "residual_multiplier"),
        norm=norm(parts["norm"]),
        head=linear(model.get_output_embeddings()),
        logits_scale=_number(model, "logit_scale") / _number(config, "logits_scaling"),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        kv_heads=given[0].kv_heads,
        head_dim=given[0].key_dim,
        positions=positions(config)[0],
    )


def _layer(layer: nn.Module, given: LayerAttention, index: int, known: Mapping[Rope, torch.Tensor]) -> Layer:
    parts = _parts(layer)
    check({"self_attn", "mlp"} <= parts.keys(), f"a layer of {', '.join(sorted(parts))}")
    attention, mlp = _parts(parts.pop("self_attn")), _parts(parts.pop("mlp"))
    roles = next((roles for roles in NORM_ROLES if {*roles} - {None} == parts.keys()), None)
    check(roles is not None, f"norms of other names: {', '.join(sorted(parts))}")
    check(given.source == index, "layers that share keys and values")
    check(given.only_rotates, "positions that do more than rotate")
    check(given.options.sink_H is None, "attention sinks")
    check(given.key_dim == given.value_dim, "keys and values of different sizes")
    norms = {name: norm(part) for name, part in parts.items()}
    before_attention, after_attention, before_mlp, after_mlp = (norms.get(role or "") for role in roles or ())
    q_norm, k_norm = (
        norm(attention.pop(name)) if name in attention else None for name in ("q_norm", "k_norm")
    )
    kv_size = given.kv_heads * given.key_dim
    q, k, v = siblings(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", (-1, kv_size, kv_size))
    for part, head_norm in ((q, q_norm), (k, k_norm)):
        known_size = head_norm is None or head_norm.scale.numel() in (given.key_dim, len(part.weight_NM))
        check(known_size, "head norms of another size")
    gate, up = siblings(mlp, ("gate_proj", "up_proj"), "gate_up_proj", (-1, -1))
    check(attention.keys() == {"o_proj"}, f"in attention: {', '.join(sorted(attention))}")
    check(len(mlp) == 2 and "down_proj" in mlp, f"in the MLP: {', '.join(sorted(mlp))}")
    down = linear(mlp.pop("down_proj"))
    return Layer(
        before_attention, after_attention, before_mlp, after_mlp, q, k, v, q_norm, k_norm,
        rope_of(given.key_TD, known), given.options, linear(attention["o_proj"]), gate, up, down,
        activation(mlp.popitem()[1]),
    )  # fmt: skip


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return a module's children, but for those that do nothing once a model is trained."""
    return {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout)}


def _number(owner: Any, name: str) -> float:
    """Return a multiplier, 1 where there is none."""
    found = getattr(owner, name, None)
    return 1.0 if found is None else float(found)


def _kind(layer: Layer) -> tuple[Any, ...]:
    """Return what all layers of a model must have in common."""
    found: list[Any] = [layer.activation, layer.before_mlp is layer.before_attention]
    for name, part in vars(layer).items():
        if isinstance(part, Norm):
            found.append((name, part.scale.shape, part.bias is None, part.eps, part.centred))
        elif isinstance(part, Linear):
            found.append((name, part.weight_NM.shape, part.bias_N is None))
    return tuple(found)
