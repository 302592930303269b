"""A model called as Transformers wrote it, over pages: attention is ours, and linear layers are joined products.

It is given token ids, position ids and one keyword more, which reaches the attention function registered under
`engine.attention.NAME`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.attention.interface import NAME
from engine.attention.paged import Options, PackedStep, Piece, Store
from engine.models import kv_shape
from engine.runner.linear import join, prepare, twin


class EagerModel:
    """A twin of a model, and its keys and values in pages.

    Args:
        model: it is not changed, and its weights are shared.
        joined: put joined products in place of its linear layers.
        deterministic: products of a fixed size, and attention one token at a time.
    """

    def __init__(
        self, model: PreTrainedModel, page_size: int, joined: bool = True, deterministic: bool = False
    ) -> None:
        self.twin = packed_twin(model)
        self.options: dict[int, Options] = {}  # of each layer's attention, once a step has been through it
        self._page_size, self._deterministic = page_size, deterministic
        products = join(self.twin, deterministic) if joined else []
        self.copied_bytes = prepare(products)

    def hold(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, all of them zero, and one page to spare."""
        layers, kv_heads, head_dim = kv_shape(self.twin.config)
        weight = next(self.twin.parameters())
        shape = pages + 1, kv_heads, self._page_size, head_dim
        self.stores = [Store.zeros(shape, weight) for _ in range(layers)]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(store.page_bytes for store in self.stores)

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        for store in self.stores:
            store.clear(pages)

    def logits(self, tokens: list[int], pieces: list[Piece], rows: list[int]) -> torch.Tensor:
        """Logits [R, V] of the tokens at `rows`, of a step of these pieces."""
        step, device = PackedStep(self.stores, pieces, self._deterministic), self.twin.device
        logits_1RV = self.twin(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=step.positions_T[None],
            use_cache=False,
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            packed=step,
        ).logits
        self.options.update(step.options)
        return logits_1RV[0]


def packed_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that shares its weights and calls packed attention."""
    packed = twin(model)
    packed.set_attn_implementation(NAME)
    return packed
