"""Linear layers that suit packed rows, in a copy of a model that shares every weight with the original.

Layers that read the same input (Q/K/V, gate/up) become one product, and a product goes whichever way is
fastest for its number of rows (`engine.backends.gemm_tuner`). The original model gives the same results as
before: its weights become parts of the joined ones where those are used as they are, so that nothing is held
twice; what a way packs is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.backends.gemm_tuner import COPIES, WAYS, Way, choose

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
TILE = 16  # rows of every product when results may not depend on how many rows there are


class FusedLinear:
    """x @ weight.T + bias, whichever way suits the rows of x; callable once `prepare` has chosen the ways.

    Args:
        weights: one [N_i, M] or several; outputs lie side by side. A Parameter that is joined with others
            becomes a view of the whole.
        biases: one [N_i] for each weight, or none.
        tiled: multiply exactly TILE rows at a time, one way, so that a row's result does not depend on its
            neighbours.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], tiled: bool = False
    ) -> None:
        self.weights, self.tiled = weights, tiled
        self.bias = torch.cat([bias.data for bias in biases]) if biases else None
        self.sizes = [len(weight) for weight in weights]
        self.shape = sum(self.sizes), weights[0].shape[1]
        self.ways: list[tuple[int, Way]] = []  # up to so many rows, this way

    def __call__(self, x_TM: torch.Tensor) -> torch.Tensor:
        """[T, M] -> [T, N]."""
        rows = len(x_TM)
        if self.tiled:
            tiles = F.pad(x_TM, (0, 0, 0, -rows % TILE)).split(TILE)
            return torch.cat([self.ways[0][1](tile, self.bias) for tile in tiles])[:rows]
        way = next((way for most, way in self.ways if rows <= most), self.ways[-1][1])
        return way(x_TM, self.bias)

    def joined(self) -> torch.Tensor:
        """The weights one below the other, [N, M]; Parameters among several become views of it."""
        whole = _already_joined(self.weights)
        if whole is None:
            whole = self.copied()
            for weight, view in zip(self.weights, whole.split(self.sizes), strict=True):
                weight.data = view
        return whole

    def copied(self) -> torch.Tensor:
        """As `joined`, but the weights stay where they are."""
        tensors = [weight.data for weight in self.weights]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def prepare(products: Sequence[FusedLinear]) -> int:
    """Choose the ways of every product; gives the bytes of weights that are then held as copies."""
    alike: dict[tuple[int, int], list[FusedLinear]] = {}
    for product in products:
        alike.setdefault(product.shape, []).append(product)
    bytes_copied = 0
    for group in alike.values():
        rule = choose([product.copied for product in group])
        if group[0].tiled:
            rule = [next((way for way in rule if way[0] >= TILE), rule[-1])]
        names = {name for _, name in rule}
        for product in group:
            weight = product.copied() if names <= COPIES else product.joined()
            made = {name: WAYS[name](weight) for name in names}
            product.ways = [(most, made[name]) for most, name in rule]
            bytes_copied += weight.nbytes * len(names & COPIES)
            product.weights = () if names <= COPIES else (weight,)
    return bytes_copied


class SharedInput:
    """A product's outputs, handed to its parts in order, then forgotten."""

    def __init__(self, product: FusedLinear) -> None:
        self.product = product
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Output `index` for input x, [..., M] -> [..., sizes[index]]."""
        if self._input is not x:
            out = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
            self._input, self._outputs = x, out.split(self.product.sizes, -1)
        output = self._outputs[index]
        if index == len(self._outputs) - 1:
            self._input, self._outputs = None, ()
        return output


class FusedOutput(nn.Module):
    """Stands where a linear layer was: one of a product's outputs, and that layer's weight for models that
    read it."""

    def __init__(self, shared: SharedInput, index: int, layer: nn.Module) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., M] -> [..., N]."""
        return self.shared.take(self.index, x)


def weight_sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that shares every weight and buffer with it."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo=shared)


def fuse_linears(model: nn.Module, tiled: bool = False) -> list[FusedLinear]:
    """Put Parts in place of the plain linear layers of `model`; gives their products, to be prepared.

    GPT-2's, which hold their weight the other way round, are replaced only where products must be `tiled`.
    """
    products, kinds = [], {nn.Linear, Conv1D} if tiled else {nn.Linear}
    for module in list(model.modules()):
        children = dict(module.named_children())
        several = [names for names in SIBLINGS if _joinable([children.get(name) for name in names])]
        plain = [name for name in children if type(children[name]) in kinds]
        alone = [(name,) for name in plain if name not in chain(*several)]
        for names in (*several, *alone):
            products.append(product_of([children[name] for name in names], tiled))
            shared = SharedInput(products[-1])
            for index, name in enumerate(names):
                setattr(module, name, FusedOutput(shared, index, children[name]))
    return products


def product_of(layers: Sequence[nn.Module], tiled: bool = False) -> FusedLinear:
    """The product that stands for linear layers of one input, all with a bias or all without."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weights = [layer.weight.t() if type(layer) is Conv1D else layer.weight for layer in layers]
    return FusedLinear(weights, biases, tiled)  # type: ignore[arg-type]


def _joinable(layers: list[nn.Module | None]) -> bool:
    """Plain linear layers of one input size, all with a bias or all without."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    return (
        len(plain) == len(layers) and len({(layer.in_features, layer.bias is None) for layer in plain}) == 1
    )


def _already_joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that these are consecutive rows of: one by itself, or several that an earlier engine has
    joined."""
    base = tensors[0].data
    shape = (sum(len(tensor) for tensor in tensors), *base.shape[1:])
    at = base.data_ptr()
    for tensor in tensors:
        if (
            tensor.data_ptr() != at
            or tensor.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
        ):
            return None
        at += tensor.nbytes
    return base.as_strided(shape, base.stride(), base.storage_offset())
