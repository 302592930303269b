"""A decoder from its spec, as a loop over layers of Triton kernels and products: nine launches a layer.

The residual stream is carried through the loop as x, and as what is still to be added to it: the sum is part
of the norm that reads it. Nothing in here may wait for the device or look at a value on it, for a CUDA graph
may be captured.

T tokens of the batch, B rows of one token (they come first), R requests with chunks, K tokens whose logits
are wanted, M width, N outputs of a product, F intermediate size, H query heads, D head size, S parts of a
sum, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.backends.cuda import kernels
from engine.models.decoder_parts import Linear, Norm, Rope, head_angles, head_order
from engine.models.decoder_spec import DecoderSpec, Layer

MAX_ROWS = (
    512  # attended at a time, for each takes up to MAX_SPLITS partial results: prefill by rows has thousands
)
TILE = 16  # rows of every product when results may not depend on how many rows there are


class Chunks(NamedTuple):
    """The requests that compute several tokens, as `attend_chunks` takes them."""

    tables_RN: torch.Tensor
    begins_R: torch.Tensor
    ends_R: torch.Tensor
    computed_R: torch.Tensor
    tiles_W2: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A batch on the device, as the kernels take it.

    Args:
        slots_T: where each token's key and value go (`write_pages`).
        tables_RN: block tables, of which row b reads line lines_B[b], its first lengths_B[b] positions.
        max_length: bounds lengths_B. split: how finely a row is cut (`attend_rows`).
        chunks: of the requests that compute several tokens, as `attend_chunks` takes them: tables_RN,
            begins_R, ends_R, computed_R, tiles_W2.
        keep_K: the tokens whose logits are wanted, rising; all if None.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    tables_RN: torch.Tensor
    lengths_B: torch.Tensor
    lines_B: torch.Tensor
    max_length: int
    split: int
    chunks: Chunks | None
    keep_K: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A layer with its products of one input made one, and which of the model's ropes rotates its heads."""

    parts: Layer
    qkv: Linear
    gate_up: Linear
    rope: int


class CudaDecoder:
    """Computes logits of a batch.

    Args:
        spec: what the model computes; its weights are shared.
        deterministic: multiply exactly TILE rows at a time, so that a row's result does not depend on others.
    """

    def __init__(self, spec: DecoderSpec, deterministic: bool) -> None:
        self.spec, self._deterministic, self.copied_bytes = spec, deterministic, 0
        self._ropes = spec.ropes
        self.layers = [self._fused(layer) for layer in spec.layers]
        first, dtype = self.layers[0], spec.embedding_VM.dtype
        self._heads = [spec.heads, spec.kv_heads, spec.kv_heads]
        products = first.qkv, first.parts.out, first.gate_up, first.parts.down
        # Of products whose sums are split only that of queries, keys and values may have a bias:
        # `write_pages` adds it.
        can_split = all(part.bias_N is None for part in products[1:]) and not (deterministic or spec.parallel)
        # The first kernel of a step waits for its inputs, which a norm does and a split product does not.
        can_split = can_split and first.parts.before_attention is not None
        layer_bytes = sum(part.weight_NM.nbytes for part in products)
        self.split_rows = kernels.max_split_rows(dtype, layer_bytes) if can_split else 0
        positions_P = torch.arange(spec.positions, device=spec.embedding_VM.device)
        self._tables_GPD = [self._angles_of(rope, positions_P) for rope in self._ropes]

    def logits(self, inputs: StepInputs, kv_L2XKPD: torch.Tensor) -> torch.Tensor:
        """Write a batch's keys and values into their pages; return logits [K, V]."""
        spec, scale = self.spec, self.spec.residual_scale
        x_TM = F.embedding(inputs.ids_T, spec.embedding_VM)
        x_TM = x_TM if spec.embedding_scale == 1 else x_TM * spec.embedding_scale
        split = len(x_TM) <= self.split_rows
        added: torch.Tensor | None = None  # to x, where it is not yet
        angles_G2TE = self._angles(inputs.positions_T)
        for layer, store_2XKPD in zip(self.layers, kv_L2XKPD, strict=True):
            normed_TM = self._norm(layer.parts.before_attention, x_TM, added)
            mixed_TN = self._attend(layer, normed_TM, angles_G2TE[layer.rope], inputs, store_2XKPD, split)
            added = self._after(layer.parts.after_attention, self._product(mixed_TN, layer.parts.out, split))
            if spec.parallel:
                x_TM.add_(added, alpha=scale)
            else:
                normed_TM = self._norm(layer.parts.before_mlp, x_TM, added)
            active_TF = self._gated(layer, normed_TM, split)
            added = self._after(layer.parts.after_mlp, self._product(active_TF, layer.parts.down, split))
        if inputs.keep_K is not None:
            x_TM = x_TM[inputs.keep_K]
            added = None if added is None else added.index_select(-2, inputs.keep_K)
        if not len(x_TM):
            return x_TM.new_empty(0, len(spec.head.weight_NM))
        logits_KV = self._product(self._norm(spec.norm, x_TM, added), spec.head)
        if spec.logits_scale != 1:
            logits_KV = logits_KV * spec.logits_scale
        if spec.logits_softcap is not None:
            logits_KV = torch.tanh(logits_KV / spec.logits_softcap) * spec.logits_softcap
        return logits_KV

    def _norm(self, norm: Norm | None, x_TM: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Add to the residual stream x, in place, what it lacks; return the norm of it, or itself if there is
        none.

        `added` is [T, M], or [S, T, M] in parts of a sum.
        """
        if norm is not None and added is not None:
            return kernels.add_norm(x_TM, added, norm, self.spec.residual_scale)
        if added is not None:  # a whole, for it comes of a norm
            x_TM.add_(added, alpha=self.spec.residual_scale)
        return x_TM if norm is None else kernels.norm(x_TM, norm)

    def _after(self, norm: Norm | None, added: torch.Tensor) -> torch.Tensor:
        """Return the norm after a part of a layer of what that gave, [T, M]; or that, where the model has
        none."""
        if norm is None:
            return added
        return kernels.norm(added, norm, self.spec.embedding_VM.dtype if added.dim() == 3 else None)

    def _product(self, x_TM: torch.Tensor, part: Linear, split: bool = False) -> torch.Tensor:
        """Return x @ weight.T + bias, [T, N]; if split, [S, T, N] in parts of the sum, without the bias."""
        if split:
            return kernels.split_k_product(x_TM, part.weight_NM)
        if not self._deterministic:
            return F.linear(x_TM, part.weight_NM, part.bias_N)
        tiles = F.pad(x_TM, (0, 0, 0, -len(x_TM) % TILE)).split(TILE)
        return torch.cat([F.linear(tile, part.weight_NM, part.bias_N) for tile in tiles])[: len(x_TM)]

    def _gated(self, layer: FusedLayer, x_TM: torch.Tensor, split: bool) -> torch.Tensor:
        """Return activation(x by gates) * (x by values), [T, F]."""
        if split:
            return kernels.split_k_gated(x_TM, layer.gate_up.weight_NM, layer.parts.activation)
        gate_TF, up_TF = self._product(x_TM, layer.gate_up).chunk(2, -1)
        return kernels.gated(gate_TF, up_TF, layer.parts.activation)

    def _attend(
        self,
        layer: FusedLayer,
        x_TM: torch.Tensor,
        angles_2TE: tuple[torch.Tensor, torch.Tensor],
        inputs: StepInputs,
        store_2XKPD: torch.Tensor,
        split: bool,
    ) -> torch.Tensor:
        """Write a layer's keys and values into their pages; return what its heads mix, [T, H * D]."""
        parts, options = layer.parts, layer.parts.options
        split = split and parts.q_norm is None  # a norm is of whole sums
        heads = self._product(x_TM, layer.qkv, split).unflatten(-1, (-1, self.spec.head_dim))
        q, k, v = heads.split(self._heads, -2)
        if parts.q_norm is not None and parts.k_norm is not None:
            q, k = self._head_norm(q, parts.q_norm), self._head_norm(k, parts.k_norm)
        keys, values = store_2XKPD
        bias_N = layer.qkv.bias_N if split else None
        cos_TE, sin_TE = angles_2TE
        q_THD = kernels.write_pages(q, k, v, cos_TE, sin_TE, inputs.slots_T, keys, values, bias_N)
        how = options.scale, options.window, options.softcap
        out_THD = q_THD.new_empty(q_THD.shape)
        for at in range(0, len(inputs.lengths_B), MAX_ROWS):
            some = slice(at, min(at + MAX_ROWS, len(inputs.lengths_B)))
            kernels.attend_rows(
                q_THD[some], keys, values, inputs.tables_RN, inputs.lengths_B[some], inputs.max_length, *how,
                inputs.lines_B[some], inputs.split, out_THD[some],
            )  # fmt: skip
        if inputs.chunks is not None:
            kernels.attend_chunks(q_THD, keys, values, *inputs.chunks, *how, out_THD)
        return out_THD.flatten(1)

    def _head_norm(self, x_THD: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return the norm of each head, or of all heads together."""
        if self.spec.has_whole_head_norms:
            return kernels.norm(x_THD.flatten(-2), norm).view(x_THD.shape)
        return kernels.norm(x_THD, norm)

    def _angles(self, positions_T: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return cosines and sines [T, D / 2] of each rope."""
        half, rows = self.spec.head_dim // 2, (F.embedding(positions_T, table) for table in self._tables_GPD)
        return [(angles_TD[:, :half], angles_TD[:, half:]) for angles_TD in rows]

    def _angles_of(self, rope: Rope | None, positions_P: torch.Tensor) -> torch.Tensor:
        """Return the angles of positions as the model has them, [P, D]: cosines, then sines."""
        angles_2PE = head_angles(rope, positions_P, self.spec.head_dim)
        return torch.cat(list(angles_2PE), -1).to(self.spec.embedding_VM.dtype)

    def _fused(self, layer: Layer) -> FusedLayer:
        order_D = head_order(layer.rope, self.spec.head_dim)
        rope = self._ropes.index(layer.rope)
        if not torch.equal(order_D, torch.arange(len(order_D))):
            layer = reordered(layer, order_D)
            self.copied_bytes += sum(part.weight_NM.nbytes for part in (layer.q, layer.k, layer.v))
        qkv, gate_up = fuse_linears([layer.q, layer.k, layer.v]), fuse_linears([layer.gate, layer.up])
        return FusedLayer(layer, qkv, gate_up, rope)


def reordered(layer: Layer, order_D: torch.Tensor) -> Layer:
    """Return a layer with copies of queries' and keys' weights, and of values', their heads' dimensions in
    another order."""

    def change(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, len(order_D)))[:, order_D].flatten(0, 1)

    def linear(part: Linear) -> Linear:
        return Linear(change(part.weight_NM), None if part.bias_N is None else change(part.bias_N))

    def norm(part: Norm | None) -> Norm | None:
        if part is None:
            return None
        bias = None if part.bias is None else change(part.bias.flatten()).view_as(part.bias)
        return replace(part, scale=change(part.scale.flatten()).view_as(part.scale), bias=bias)

    v = Linear(layer.v.weight_NM.clone(), layer.v.bias_N)
    return replace(
        layer, q=linear(layer.q), k=linear(layer.k), v=v, q_norm=norm(layer.q_norm), k_norm=norm(layer.k_norm)
    )


def fuse_linears(parts: Sequence[Linear]) -> Linear:
    """Return the product of all outputs of several that read the same input, side by side.

    Parameters become views of the joined weight, so that nothing is held twice and the model gives what it
    gave.
    """
    whole_NM = _adjacent([part.weight_NM for part in parts])
    if whole_NM is None:
        whole_NM = torch.cat([part.weight_NM.detach() for part in parts])
        for part, view in zip(parts, whole_NM.split([len(part.weight_NM) for part in parts]), strict=True):
            part.weight_NM.data = view
    biases = [part.bias_N for part in parts if part.bias_N is not None]
    return Linear(whole_NM, torch.cat(biases) if biases else None)


def _adjacent(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the tensor that these are consecutive rows of, or None if there is none."""
    first = tensors[0].detach()
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        apart = tensor.data_ptr() != at or tensor.untyped_storage().data_ptr() != storage
        if apart or not tensor.is_contiguous():
            return None
        at += tensor.nbytes
    rows = sum(map(len, tensors))
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
