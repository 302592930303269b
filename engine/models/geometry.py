"""A model's sizes: its keys and values as its own cache holds them, its positions, its rotations."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import InputError, check

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FIRST, LEAST = 16, 32  # telling positions: so many from the first on, and so many in all
MAX_TOLD = 2**31  # of a model whose config names no bound, the last positions are not asked for


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one layer of a model's cache holds of a token: heads of keys and values, and their sizes."""

    kv_heads: int
    key_dim: int
    value_dim: int


def refuse_other_state(model: PreTrainedModel) -> None:
    """Raise InputError for models whose config says that their past is not keys and values alone."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if model.config.is_encoder_decoder:
        kinds = {"an encoder"}
    elif not kinds and getattr(model, "_is_stateful", False):
        kinds = {"recurrent state"}
    if kinds:
        _refuse(model, f"has {', '.join(sorted(kinds))}")


def _refuse(model: PreTrainedModel, why: str) -> NoReturn:
    raise InputError(
        f"{type(model).__name__} {why}: only causal models with full or sliding-window attention and a "
        "key-value cache can be batched here"
    )


def kv_layers(model: PreTrainedModel) -> list[KVLayer]:
    """Return what the model's own cache holds of a token, layer by layer: found by running one token.

    A config says it only to who knows the architecture: layers differ, share their keys and values, or
    compress them.

    Raises:
        InputError: for a model that keeps something else, or nothing.
    """
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    refuse_other_state(model)
    cache = DynamicCache(config=model.config)
    try:
        with torch.inference_mode():
            model(
                torch.zeros(1, 1, dtype=torch.long, device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError) as error:
        _refuse(model, f"does not take a cache of keys and values ({repr(error).splitlines()[0]:.200})")
    layers: list[Any] = [
        layer for layer in cache.layers if getattr(layer, "keys", layer) is not None
    ]  # the others read these
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        _refuse(model, f"keeps {', '.join(sorted(kind.__name__ for kind in kinds))}")
    if not layers:
        _refuse(model, "keeps no keys and values")
    return [KVLayer(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in layers]


def kv_bytes_per_token(model: PreTrainedModel, element_bytes: int | None = None) -> int:
    """Bytes of one token's keys and values in all layers, in the model's dtype or of elements of another
    size.

    A sliding window bounds how many tokens are kept, not this. Raises what `kv_layers` raises.
    """
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in kv_layers(model))
    return numbers * (element_bytes or model.dtype.itemsize)


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of each RoPE of a model, `rope_type` among them: one for all layers, or one a layer
    type."""
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [rope for rope in (given, *given.values()) if isinstance(rope, dict) and "rope_type" in rope]


def positions(config: PreTrainedConfig) -> tuple[int, str]:
    """How many positions a request may take, and why not all that the model has (empty where it may).

    Transformers rotates every token of a pass by other frequencies once one of them lies beyond a bound. What
    a request gets would depend on its company there, and its cache would mix both. The bound of `dynamic`
    RoPE is the model's own number of positions, which no request passes; that of `longrope` lies below.
    """
    stated = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = sys.maxsize if stated is None else int(check("max_position_embeddings", stated, int, 1))
    bounds = [
        rope["original_max_position_embeddings"] for rope in ropes(config) if rope["rope_type"] == "longrope"
    ]
    bound = min(bounds, default=most)
    if bound >= most:
        return most, ""
    return (
        bound,
        f" (of its {most}: beyond, its longrope RoPE would make results depend on what shares a batch)",
    )


def max_positions(config: PreTrainedConfig) -> int:
    """Return how many positions a request may take, prompt and output together; see `positions`."""
    return positions(config)[0]


def config_numbers(config: PreTrainedConfig) -> set[int]:
    """Return the whole numbers anywhere in a config that could be positions: where something begins or ends.

    No list of names could be whole: a temperature by position begins at `floor_scale` in one model, at
    `rope_parameters["original_max_position_embeddings"]` in another.
    """
    most = positions(config)[0]
    found: set[int] = set()
    todo: list[Any] = [config.get_text_config(decoder=True).to_dict()]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, int) and not isinstance(value, bool) and 0 < value < most:
            found.add(value)
    return found


def telling_positions(config: PreTrainedConfig, capacity: int = sys.maxsize) -> list[int]:
    """Return rising positions from the whole range: the first, either side of each number in the config, the
    last.

    What a model does otherwise from some position on shows there.

    Args:
        capacity: positions that a request may take at most, besides those that the model has; no more are
            returned.
    """
    most = min(positions(config)[0], capacity)
    found = {*range(min(FIRST, most))}
    for bound in (*config_numbers(config), most - 1):
        if 0 < bound < min(most, MAX_TOLD):
            found |= {bound - 1, bound}
    if len(found) > capacity:
        return list(range(capacity))
    more = (at for at in range(FIRST, most) if at not in found)
    return sorted(found | set(itertools.islice(more, max(0, LEAST - len(found)))))
