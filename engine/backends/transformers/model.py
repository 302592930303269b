"""A model called as Transformers wrote it, over pages: attention is ours, and linear layers are joined
products.

It is given token ids, position ids and one keyword more, which reaches the attention function registered
under `engine.attention.NAME`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.backends.fused_linear import fuse_linears, prepare, weight_sharing_copy
from engine.backends.transformers.interface import NAME
from engine.backends.transformers.paged_attention import PackedStep, Store
from engine.models.attention_trace import attention_layers
from engine.models.errors import refused
from engine.step import Span


class TransformersModel:
    """A copy of a model that shares its weights, and its keys and values in pages.

    Args:
        model: it is not changed, and its weights are shared.
        joined: put joined products in place of its linear layers.
    """

    def __init__(self, model: PreTrainedModel, page_size: int, joined: bool = True) -> None:
        self.model = weight_sharing_copy(model)
        with refused(model):
            self.layers = attention_layers(self.model)
        self.model.set_attn_implementation(NAME)
        self._page_size = page_size
        self.copied_bytes = prepare(fuse_linears(self.model) if joined else [])

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, all of them zero, and one page to spare."""
        weight, stores = next(self.model.parameters()), []
        for index, layer in enumerate(self.layers):
            if layer.source == index:
                sizes = pages + 1, layer.kv_heads, self._page_size, layer.key_dim, layer.value_dim
                stores.append(Store.zeros(sizes, weight))
            else:
                stores.append(stores[layer.source])
        self.stores = stores
        self._own_stores = [store for index, store in enumerate(stores) if self.layers[index].source == index]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(store.page_bytes for store in self._own_stores)

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        for store in self._own_stores:
            store.clear(pages)

    def logits(
        self, tokens: list[int], spans: list[Span], rows: list[int], position_ids: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [R, V] of the tokens at `rows`, of a step of these spans.

        `position_ids` are what the model is told instead of the tokens' places in their requests.
        """
        return self.compute(PackedStep(self.stores, spans), tokens, rows, position_ids)

    def compute(
        self, step: PackedStep, tokens: list[int], rows: list[int], position_ids: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [R, V] of the tokens at `rows`, of a step with these tokens; `position_ids` as for
        `logits`."""
        device = self.model.device
        positions_T = step.positions_T if position_ids is None else torch.tensor(position_ids, device=device)
        logits_1RV = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=positions_T[None],
            use_cache=False,
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            packed=step,
        ).logits
        return logits_1RV[0]
