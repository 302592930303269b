"""A model called as Transformers wrote it, over pages: only its attention is ours.

It is given token ids, position ids and one keyword more, which reaches the attention function that is
registered under `interface.NAME`.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel

from engine.backends import Backend
from engine.backends.transformers.paged_attention import PagedBatch, Store
from engine.models.attention_trace import LayerAttention, attend
from engine.models.weights import weight_sharing_copy
from engine.step import Batch

NAME = "dynamic_batch_packed"  # no mask function is registered for it, so Transformers builds no mask
AttentionInterface.register(NAME, attend)


class TransformersBackend(Backend):
    """A copy of a model that shares its weights, and its keys and values in pages.

    Args:
        model: it is not changed.
        layers: what each layer gives its attention.
    """

    def __init__(self, model: PreTrainedModel, layers: list[LayerAttention], page_size: int) -> None:
        self.model, self.layers, self._page_size = weight_sharing_copy(model), layers, page_size
        self.model.set_attn_implementation(NAME)

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, and for a page of nobody, which stays zero."""
        self._nobody, stores = pages, {}
        for index, layer in enumerate(self.layers):
            if layer.source == index:
                sizes = layer.kv_heads, layer.key_dim, layer.value_dim
                stores[index] = Store.zeros(pages + 1, self._page_size, *sizes, next(self.model.parameters()))
        self._stores = stores
        self._by_layer = [stores[layer.source] for layer in self.layers]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(store.page_bytes for store in self._stores.values())

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        for store in self._stores.values():
            store.clear(pages)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits [R, V] of a batch's wanted tokens."""
        device = self.model.device
        position_ids = batch.position_ids or batch.positions
        logits_1RV = self.model(
            input_ids=torch.tensor([batch.tokens], device=device),
            position_ids=torch.tensor([position_ids], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(batch.wanted, dtype=torch.long, device=device),
            packed=PagedBatch(self._by_layer, batch, self._nobody),
        ).logits
        return logits_1RV[0]
