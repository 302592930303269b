"""What a config says of a model's sizes: keys and values, positions, rotations."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def kv_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, KV heads and head size: what keys and values are made of."""
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, kv_heads, head_dim


def kv_bytes_per_token(config: PreTrainedConfig, element_bytes: int) -> int:
    """Bytes of one token's keys and values in all layers; a sliding window bounds how many tokens, not this."""
    return 2 * math.prod(kv_shape(config)) * element_bytes


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of each RoPE of a model, `rope_type` among them: one for all layers, or one a layer type."""
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [rope for rope in (given, *given.values()) if isinstance(rope, dict) and "rope_type" in rope]


def positions(config: PreTrainedConfig) -> tuple[int, str]:
    """How many positions a request may take, and why not all that the model has (empty where it may).

    Transformers rotates every token of a pass by other frequencies once one of them lies beyond a bound. What a request
    gets would depend on its company there, and its cache would mix both. The bound of `dynamic` RoPE is the model's own
    number of positions, which no request passes; that of `longrope` lies below.
    """
    most = int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize)
    bounds = [rope["original_max_position_embeddings"] for rope in ropes(config) if rope["rope_type"] == "longrope"]
    bound = min(bounds, default=most)
    if bound >= most:
        return most, ""
    return bound, f" (of its {most}: beyond, its longrope RoPE would make results depend on what shares a batch)"
