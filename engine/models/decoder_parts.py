"""Parts of a decoder, read from a model's modules and understood by what they do.

A norm and an activation are known by their results, RoPE by what it does to a key, an embedding's scale by
looking a token up.

T tokens, M width, N outputs, H query heads, D head size, E pairs of it that RoPE rotates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from engine.models.attention_trace import telling_token

T = TypeVar("T")
# How far what a part gives may lie from what it is taken for, relative to the largest: rounding, no more.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class OtherPartError(Exception):
    """A model has a part that a DecoderSpec has no place for."""


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias; rows of a fused weight are a view of it."""

    weight_NM: torch.Tensor
    bias_N: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm, or LayerNorm where `centred`, of [M]; of a head, [D] or [H, D], or of all heads, [H * D]."""

    scale: torch.Tensor  # what is multiplied by in the end: the weight, or 1 + weight in float32
    bias: torch.Tensor | None
    eps: float
    centred: bool


@dataclass(frozen=True)
class Rope:
    """Rotates the first 2 E dimensions of a head by pairs: i and i + E, or 2 i and 2 i + 1 if interleaved.

    Args:
        module: the model's own. arguments: what it takes besides positions.
        pairs: E.
    """

    module: nn.Module
    arguments: tuple[str, ...]
    pairs: int
    interleaved: bool

    def angles(self, positions_T: torch.Tensor) -> torch.Tensor:
        """Return cosines and sines [2, T, E], multiplied by RoPE's attention scaling if it has one (YaRN)."""
        return _angles(self.module, self.arguments, positions_T)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first and the second number of each pair of the last dimension."""
        size = 2 * self.pairs
        if self.interleaved:
            return x[..., :size:2], x[..., 1:size:2]
        return x[..., : self.pairs], x[..., self.pairs : size]


def head_order(rope: Rope | None, dim: int) -> torch.Tensor:
    """Return a head's dimensions in such an order that i and i + D / 2 are a pair; the last pairs may be
    none.

    Queries and keys may both be put into it, which changes no product of the two. Of 8 dimensions, of which
    interleaved RoPE rotates 4: 0 2 4 5 1 3 6 7.
    """
    dims_D = torch.arange(dim)
    if rope is None:
        return dims_D
    first_E, second_E = rope.split(dims_D)
    rest = dims_D[2 * rope.pairs :]
    return torch.cat([first_E, rest[: len(rest) // 2], second_E, rest[len(rest) // 2 :]])


def head_angles(rope: Rope | None, positions_T: torch.Tensor, dim: int) -> torch.Tensor:
    """Return cosines and sines of all pairs of a head, [2, T, D / 2]: 1 and 0 for those that are not
    rotated."""
    none_2TE = torch.tensor([1.0, 0.0], device=positions_T.device)[:, None, None]
    none_2TE = none_2TE.expand(2, len(positions_T), dim // 2)
    if rope is None:
        return none_2TE
    angles_2TE = rope.angles(positions_T)
    return torch.cat([angles_2TE, none_2TE[..., angles_2TE.shape[-1] :]], -1)


def check(known: bool, what: str) -> None:
    """Raise OtherPartError unless a part is as it is known here; `what` says what else it has."""
    if not known:
        raise OtherPartError(what)


def linear(module: Any) -> Linear:
    """Return a product; a subclass or a quantized one may compute something else."""
    check(type(module) is nn.Linear, f"{type(module).__name__} in place of a linear layer")
    return Linear(module.weight, module.bias)


def siblings(
    parts: dict[str, nn.Module], names: Sequence[str], fused: str, sizes: Sequence[int]
) -> list[Linear]:
    """Take the products of one input out of `parts`, where they may be one: its outputs lie side by side.

    Args:
        sizes: of each product's outputs; those of -1 have an equal share of what the others leave.
    """
    if fused in parts:
        whole = linear(parts.pop(fused))
        share = (len(whole.weight_NM) - sum(size for size in sizes if size >= 0)) // sizes.count(-1)
        sizes = [share if size < 0 else size for size in sizes]
        check(sum(sizes) == len(whole.weight_NM), f"{fused} of other sizes")
        biases = [None] * len(sizes) if whole.bias_N is None else whole.bias_N.split(sizes)
        found = [Linear(w, bias) for w, bias in zip(whole.weight_NM.split(sizes), biases, strict=True)]
    else:
        check(parts.keys() >= set(names), f"no {', no '.join(sorted(set(names) - parts.keys()))}")
        found = [linear(parts.pop(name)) for name in names]
    check(len({part.bias_N is None for part in found}) == 1, f"biases of some of {', '.join(names)} alone")
    return found


def embedding_scale(embedding: Any) -> float:
    """Return what an embedding multiplies its weight by."""
    check(isinstance(embedding, nn.Embedding), "no plain embedding")
    token = torch.tensor([telling_token(embedding)], device=embedding.weight.device)
    found_M, weight_M = _call(embedding, token)[0], embedding.weight[token][0]
    wide_M = weight_M.double()
    scale = float(found_M.double() @ wide_M / (wide_M @ wide_M))
    check(
        _error(found_M[None], wide_M[None] * scale) <= ROUNDING[found_M.dtype],
        "an embedding that does more than scale",
    )
    return 1.0 if torch.equal(found_M, weight_M) else scale


def norm(module: Any) -> Norm:
    """Return what a norm computes, by its results for rows so small that epsilon shows, and for others."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or not isinstance(eps, float):
        raise OtherPartError(f"{type(module).__name__} in place of a norm with a weight and an epsilon")
    x = torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    x = (x * torch.tensor([1.0, 3.0, 0.1, 1e-3]).view(-1, *[1] * weight.dim())).to(weight)
    found, wide = _call(module, x), torch.promote_types(weight.dtype, torch.float32)
    candidates: dict[Norm, torch.Tensor] = {}
    for centred in (False, True):
        y = x.to(wide) - x.to(wide).mean(-1, keepdim=True) if centred else x.to(wide)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        for scale in (weight, 1 + weight.float()):
            candidates[Norm(scale, bias, eps, centred)] = y * scale + (0 if bias is None else bias)
    return _closest(found, candidates, f"the norm {type(module).__name__}")


def activation(module: nn.Module) -> str:
    """Return the name of an activation in ACTIVATIONS, known by its results in float64."""
    x = torch.linspace(-8, 8, 65, dtype=torch.float64)
    found = _call(module, x)
    for name, function in ACTIVATIONS.items():
        if isinstance(found, torch.Tensor) and torch.allclose(found, function(x), rtol=1e-9, atol=1e-12):
            return name
    raise OtherPartError(f"the activation {type(module).__name__}")


def ropes(rotary: Any, config: Any, positions_T: torch.Tensor) -> dict[Rope, torch.Tensor]:
    """Return each way in which a layer may rotate, and its angles [2, T, E].

    A module may have other angles for each type of layers.
    """
    kinds: list[tuple[str, ...]] = [()]
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = [(kind,) for kind in sorted(set(config.layer_types)) if config.rope_parameters[kind]]
    found: dict[Rope, torch.Tensor] = {}
    for kind in kinds:
        angles_2TE = _angles(rotary, kind, positions_T)
        for interleaved in (False, True):
            found[Rope(rotary, kind, angles_2TE.shape[-1], interleaved)] = angles_2TE
    return found


def rope_of(key_TD: torch.Tensor, known: Mapping[Rope, torch.Tensor]) -> Rope | None:
    """Return how a layer rotates, or None where it does not: found by what became of one token's key.

    Args:
        key_TD: the key at T positions, of which the first is 0.
        known: the ways that there are, and their angles at these positions.
    """
    candidates: dict[Rope | None, torch.Tensor] = {None: key_TD[:1].expand_as(key_TD)}
    for rope, angles_2TE in known.items():
        cos_TE, sin_TE = angles_2TE / angles_2TE[0, 0, 0]
        if 2 * rope.pairs <= key_TD.shape[1]:
            (a_E, b_E), rest_D = rope.split(key_TD[0]), key_TD[0, 2 * rope.pairs :]
            rotated_TE = torch.cat([a_E * cos_TE - b_E * sin_TE, b_E * cos_TE + a_E * sin_TE], -1)
            order_D = torch.cat(
                [*rope.split(torch.arange(key_TD.shape[1])), torch.arange(2 * rope.pairs, key_TD.shape[1])]
            )
            expected_TD = torch.empty(key_TD.shape, dtype=rotated_TE.dtype, device=key_TD.device)
            expected_TD[:, order_D] = torch.cat([rotated_TE, rest_D.expand(len(key_TD), -1)], -1)
            candidates[rope] = expected_TD
    return _closest(key_TD, candidates, "a rotation of another kind")


def _angles(module: nn.Module, arguments: tuple[str, ...], positions_T: torch.Tensor) -> torch.Tensor:
    """Return a RoPE module's cosines and sines, [2, T, E]."""
    found = _call(module, torch.empty(0, device=positions_T.device), positions_T[None], *arguments)
    check(isinstance(found, tuple) and len(found) == 2, "a RoPE module that gives no cosines and sines")
    both_2TD = torch.cat(found).float()
    first, second = both_2TD.chunk(2, -1)
    return first if torch.equal(first, second) else both_2TD[..., ::2]


def _call(module: nn.Module, *inputs: Any) -> Any:
    """Call a part as those that are known here are called; one that can't be is another."""
    try:
        return module(*inputs)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError) as error:
        raise OtherPartError(f"{type(module).__name__}, which can't be called as those known here") from error


def _closest(found: torch.Tensor, candidates: Mapping[T, torch.Tensor], what: str) -> T:
    """Return whichever candidate a part's results lie closest to; OtherPartError if even that is not close.

    In 16 bits more than one may be close. An error counts by its channel's own largest number: one channel
    may be a hundred times as large as all others.
    """
    errors = {name: _error(found, expected) for name, expected in candidates.items()}
    best = min(errors, key=lambda name: errors[name])
    check(errors[best] <= ROUNDING[found.dtype], what)
    return best


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far the results [rows, channels ...] lie apart, relative to the largest of their channel."""
    if found.shape != expected.shape:
        return math.inf
    largest = expected.abs().amax(0).clamp_min(torch.finfo(found.dtype).tiny)
    return float(((found - expected).abs() / largest).nan_to_num(math.inf).max())
