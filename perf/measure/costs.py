"""FLOPs and bytes that a model's work needs at least: linear layers, attention and cache, from its shapes.

With the machine's measured rates this gives the roofline columns. It counts; it runs and times nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from engine import kv_bytes_per_token, kv_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelCosts:
    """Sizes of one model that decide what a token costs."""

    linear_weights: int
    head_weights: int
    # what a decode step reads: all linear layers; of the embedding only the tokens' own rows
    weight_bytes: int
    kv_bytes: int  # of one token in all layers
    attention_flops: int  # of one query with one key and value, in all layers

    def request_flops(self, prompt: int, output: int) -> float:
        """Return the FLOPs that one request needs at least: 2 a weight and token, causal attention, logits
        where a token is chosen.

        The last output token is never computed. A sliding window would need less; it is not taken into
        account.
        """
        tokens = prompt + output - 1
        products = 2.0 * (self.linear_weights * tokens + self.head_weights * output)
        return products + self.attention_flops * tokens * (tokens + 1) / 2

    def useful_flops_pct(
        self, lengths: Iterable[tuple[int, int]], seconds: float, matmul_gflops: float
    ) -> float:
        """Return the FLOPs that requests of these (prompt, output) lengths need, in percent of those that the
        measured product does in these seconds."""
        return 100.0 * sum(self.request_flops(*pair) for pair in lengths) / (seconds * matmul_gflops * 1e9)

    def decode_bandwidth_pct(self, batch: int, context: float, step_ms: float, copy_gbps: float) -> float:
        """Return the bytes that a decode step of `batch` requests reads (weights once, and keys and values of
        `context` tokens for each), in percent of those that the measured copy moves in `step_ms`."""
        read = self.weight_bytes + batch * context * self.kv_bytes
        return 100.0 * read / (step_ms * 1e-3 * copy_gbps * 1e9)


def model_costs(
    model: PreTrainedModel, weight_item: int | None = None, kv_item: int | None = None
) -> ModelCosts:
    """Count the layers of a loaded model, whose weights take `weight_item` bytes each, and keys and values
    `kv_item` bytes a number, if not as loaded."""
    head = model.get_output_embeddings()
    layers = {id(m): m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    weights = sum(weight.numel() for weight in layers.values())
    head_weights = head.weight.numel() if head is not None else 0
    item = weight_item or model.dtype.itemsize
    return ModelCosts(
        linear_weights=weights,
        head_weights=head_weights,
        weight_bytes=(weights + head_weights) * item,
        kv_bytes=kv_bytes_per_token(model, kv_item),
        attention_flops=sum(2 * heads * (layer.key_dim + layer.value_dim) for layer in kv_layers(model)),
    )
