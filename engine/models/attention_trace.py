"""What each layer of a model gives its attention: found by running the unmodified model once, with ours in
its place.

Transformers hands a mask function to whoever makes masks, and options to whoever attends. Here both are
written down, so that a mask can be asked about any two positions, however far apart. A window that lives in
the mask alone, chunks and attention in both directions are seen at once, where the logits of a few tokens
would not show them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from engine.errors import InputError
from engine.models.geometry import config_numbers, positions, telling_positions
from engine.models.weights import weight_sharing_copy

TRACE = "dynamic_batch_trace"
RANDOM_PAIRS = 2000
# Relative: what rounding to 16 bits does to a vector's length, of which one pair may be most, and more.
SAME_LENGTH, SAME_LENGTH_BFLOAT16 = 1e-2, 3e-2
# Given to every attention function, or saying what the mask says too: none of them changes what is computed
# here.
HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "is_training"}
MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer's attention has besides queries, keys and values; None is none of it."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sink_H: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer's attention takes: the sizes of its keys and values, and its options.

    `source` is the layer whose keys and values it reads: itself, or the one that it shares them with.
    `only_rotates`: queries and keys of one token have the same length at every position, so that rotary
    embedding can be all that a position does to them. A temperature by position (Llama 4, Ministral 3) is
    more.
    `key_TD`: the keys of the first head of one and the same token at each of the telling positions, from
    which can be read how a position rotates them.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    options: Options
    source: int
    only_rotates: bool
    key_TD: torch.Tensor = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer gives its attention: queries [1, H, T, D], keys and values [1, K, T, D], a mask or
    none."""

    module: torch.nn.Module
    q_1HTD: torch.Tensor
    k_1KTD: torch.Tensor
    v_1KTD: torch.Tensor
    mask: torch.Tensor | None
    options: Options

    @property
    def layer(self) -> int:
        """The layer's number."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def refuse(self, problem: str) -> NoReturn:
        """Raise InputError for what attention over pages cannot do."""
        raise InputError(f"{type(self.module).__name__} {problem}: use runner='padded' for this model")


class Attention(Protocol):
    """Computes attention; handed to the model as the keyword `packed`, which it passes on to its layers."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return [1, T, H, D]."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    packed: Attention | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Have `packed` compute the attention of one layer: what Transformers' AttentionInterface calls.

    Raises:
        InputError: for an option that it would have to ignore.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = Options(scale, sliding_window, softcap, s_aux)
    call = AttentionCall(module, query, key, value, attention_mask, options)
    unknown = sorted(name for name, value in others.items() if name not in HARMLESS and _asks(value))
    if unknown:
        call.refuse(f"uses {', '.join(unknown)}")
    if packed is None:
        call.refuse("does not pass on what attention needs")
    return packed.attend(call), None


def _asks(value: Any) -> bool:
    """Return whether an option asks for something: None, False and zero do not."""
    return value is not None and (isinstance(value, torch.Tensor) or bool(value))


@dataclass(slots=True)
class _Trace(Attention):
    """Writes down the calls of one forward pass."""

    layers: dict[int, LayerAttention] = field(default_factory=dict)
    masks: dict[int, MaskFunction | None] = field(default_factory=dict)
    # keys, values, their layer
    states: list[tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Write down what a layer gives; the result has the right shape and no meaning."""
        key, value, layer, function = (
            call.k_1KTD,
            call.v_1KTD,
            call.layer,
            getattr(call.mask, "function", None),
        )
        if layer in self.layers:
            call.refuse(f"attends twice in layer {layer}")
        if call.mask is not None and function is None:
            call.refuse("makes a mask of its own")
        if call.mask is None and not getattr(call.module, "is_causal", True):
            call.refuse("attends in both directions")
        source = next((at for k, v, at in self.states if k is key and v is value), layer)
        self.states.append((key, value, layer))
        only_rotates = _same_length(call.q_1HTD) and _same_length(key)
        sizes = key.shape[1], key.shape[-1], value.shape[-1]
        self.layers[layer] = LayerAttention(*sizes, call.options, source, only_rotates, key[0, 0].clone())
        self.masks[layer] = function
        groups = call.q_1HTD.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous()


def _mask(
    q_length: int, kv_length: int, mask_function: MaskFunction, device: Any = "cpu", **_: Any
) -> torch.Tensor:
    """Return a tensor that stands for a mask of these tokens, and has the function that it was to be made
    from."""
    mask: Any = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.function = mask_function
    return mask


def _same_length(heads_1HTD: torch.Tensor) -> bool:
    """Whether the vectors of a head have one length at every token."""
    lengths_HT = heads_1HTD[0].double().norm(dim=-1)
    longest_H1 = lengths_HT.amax(-1, keepdim=True)
    allowed = SAME_LENGTH_BFLOAT16 if heads_1HTD.dtype is torch.bfloat16 else SAME_LENGTH
    return bool((longest_H1 - lengths_HT <= allowed * longest_H1).all())


AttentionInterface.register(TRACE, attend)
AttentionMaskInterface.register(TRACE, _mask)


@torch.inference_mode()
def attention_layers(model: PreTrainedModel) -> list[LayerAttention]:
    """Return what each layer of `model` gives its attention: found by one run of a copy.

    Raises:
        InputError: for an option that attention over pages does not have, and for a mask that its window does
            not say.
    """
    # One token at positions that rise by leaps. The mask says that they are of one text all the same.
    at = torch.tensor([telling_positions(model.config)], device=model.device)
    ids = torch.full_like(at, telling_token(model.get_input_embeddings()))
    trace, keep = _Trace(), torch.zeros(1, dtype=torch.long, device=model.device)
    traced = weight_sharing_copy(model)
    traced.set_attn_implementation(TRACE)
    mask = torch.ones_like(at)
    traced(ids, position_ids=at, attention_mask=mask, use_cache=False, logits_to_keep=keep, packed=trace)
    layers = trace.layers
    if not layers or sorted(layers) != list(range(len(layers))):
        raise InputError(
            f"{type(model).__name__} does not attend in layers 0, 1, 2, ...: use runner='padded'"
        )
    checked: set[tuple[int, int | None]] = set()  # layers share their masks
    for layer, function in trace.masks.items():
        window = layers[layer].options.window
        if function is not None and (id(function), window) not in checked:
            _check_mask(model, layer, function, window)
            checked.add((id(function), window))
    return [layers[layer] for layer in range(len(layers))]


def telling_token(embedding: Any) -> int:
    """Return the first token whose embedding is not zero, as padding's is: keys of zero tell nothing."""
    rows = range(len(embedding.weight))
    return next((token for token in rows if embedding.weight[token].any()), 0)


def _check_mask(model: PreTrainedModel, layer: int, function: MaskFunction, window: int | None) -> None:
    """Raise InputError unless the mask says what the causal mask of this window says, at positions of the
    whole range.

    It is asked about each number in the config and each power of two, their neighbours, and pairs at random.
    """
    most = min(positions(model.config)[0], 2**31)
    edges = (0, 1, -1, *((-window - 1, -window, 1 - window) if window else ()))
    bounds = {0, most, *config_numbers(model.config), *(2**power for power in range(most.bit_length()))}
    near = sorted({at + by for at in bounds for by in (-2, -1, 0, 1, 2)})
    random = np.random.default_rng(0).integers(0, most, (2, RANDOM_PAIRS))
    grid_q, grid_kv = np.meshgrid(near, near)
    edge_q, edge = np.meshgrid(near, edges)
    q_N = np.concatenate([grid_q.ravel(), edge_q.ravel(), random[0]])
    kv_N = np.concatenate([grid_kv.ravel(), (edge_q + edge).ravel(), random[1]])
    inside_N = (q_N >= 0) & (q_N < most) & (kv_N >= 0) & (kv_N < most)
    q_N, kv_N = q_N[inside_N], kv_N[inside_N]
    expected_N = (kv_N <= q_N) & (kv_N > q_N - (window or most))
    zero = torch.tensor(0, device=model.device)
    tensors = (torch.from_numpy(array).to(model.device) for array in (q_N, kv_N))
    found_N = function(zero, zero, *tensors).expand(len(q_N)).cpu().numpy()
    wrong = np.flatnonzero(found_N != expected_N)
    if len(wrong):
        q, kv = q_N[wrong[0]], kv_N[wrong[0]]
        given = "no window" if window is None else f"a window of {window}"
        raise InputError(
            f"{type(model).__name__} gives attention {given} in layer {layer}, and its mask says otherwise: "
            f"position {q} {'sees' if found_N[wrong[0]] else 'does not see'} {kv}; use "
            "runner='padded' for this model"
        )
