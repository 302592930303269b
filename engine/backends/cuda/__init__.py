"""Decoders on a GPU: a loop over layers of Triton kernels, over pages, a step ahead of the host."""

from __future__ import annotations

from engine.models.decoder_spec import DecoderSpec

MAX_POSITIONS = 2**20  # cosines and sines of all are kept: 256 MB with heads of 128 in 16 bits


def can_run(spec: DecoderSpec) -> bool:
    """Return whether a decoder is one that CudaBackend computes.

    It is in 32 or 16 bits (no kernel here computes in float64), with heads of an even size. Of the norms
    after attention and after the MLP, as of those of queries and keys, both are there or neither; and there
    is one before attention or after it. Its positions are so few that their angles can be looked up: a graph
    may not compute them by the model's own module.
    """
    layer = spec.layers[0]
    return (
        all(weight.dtype.itemsize <= 4 for weight in spec.weights)
        and layer.activation in ("silu", "gelu_tanh")
        and spec.head_dim % 2 == 0
        and spec.positions <= MAX_POSITIONS
        and (layer.after_attention is None) == (layer.after_mlp is None)
        and (layer.q_norm is None) == (layer.k_norm is None)
        and (layer.before_attention is not None or layer.after_attention is not None)
    )
