"""A decoder from its spec, as a loop over layers of Triton kernels and products: eight launches a layer,
seven of few rows, five of one token; more where heads or outputs are normed, or there are chunks.

The residual stream is carried through the loop as x, and as what is still to be added to it: the sum is part
of the norm that reads it. Nothing in here may wait for the device or look at a value on it, for a CUDA graph
may be captured.

T tokens of the batch, B rows of one token (they come first), R requests with chunks, K tokens whose logits
are wanted, M width, N outputs of a product, F intermediate size, H query heads, D head size, S parts of a
sum, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.backends.cuda import kernels
from engine.backends.cuda.fused_layer import FusedLayer, fuse
from engine.models.decoder_parts import Linear, Norm, Rope, head_angles
from engine.models.decoder_spec import DecoderSpec

# Rows attended at a time, for each takes up to MAX_SPLITS partial results: prefill by rows has thousands.
ATTENDED_ROWS = 512
TILE = 16  # rows of every product when results may not depend on how many rows there are
Angles = list[tuple[torch.Tensor, torch.Tensor]]  # cosines and sines [T, D / 2] by each rope


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
        rows_are_new: no two rows are of one request, and `attend_rows` writes their keys and values.
        chunks: of the requests that compute several tokens, as `attend_chunks` takes them: tables_RN,
            begins_R, ends_R, computed_R, tiles_W2.
        keep_K: the tokens whose logits are wanted; all if None.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    tables_RN: torch.Tensor
    lengths_B: torch.Tensor
    lines_B: torch.Tensor
    max_length: int
    split: int
    rows_are_new: bool
    chunks: Chunks | None
    keep_K: torch.Tensor | None

    @property
    def written_apart(self) -> slice:
        """The tokens that `write_pages` writes: all but the rows that `attend_rows` does."""
        return slice(len(self.lengths_B) if self.rows_are_new else 0, None)


class Stream(NamedTuple):
    """The residual stream between two layers.

    Args:
        x_TM: what is in it, changed in place.
        added: what it lacks yet, [T, M], or [S, T, M] in parts of a sum.
        squares_P: the sum of squares of its row, in parts, if it is one that lacks nothing.
    """

    x_TM: torch.Tensor
    added: torch.Tensor | None
    squares_P: torch.Tensor | None


class CudaDecoder:
    """Computes logits of a batch, one at a time on one stream.

    Args:
        spec: what the model computes; its weights are shared.
        deterministic: multiply exactly TILE rows at a time, so that a row's result does not depend on others.
    """

    def __init__(self, spec: DecoderSpec, deterministic: bool) -> None:
        self.spec, self._deterministic = spec, deterministic
        self.layers = [fuse(layer, spec.ropes, spec.head_dim) for layer in spec.layers]
        first, dtype = self.layers[0], spec.embedding_VM.dtype
        self._heads = [spec.heads, spec.kv_heads, spec.kv_heads]
        products = first.qkv, first.parts.out, first.gate_up, first.parts.down
        # Of products whose sums are split only that of queries, keys and values may have a bias:
        # `attend_rows` adds it.
        can_split = all(part.bias_N is None for part in products[1:]) and not (deterministic or spec.parallel)
        # The first kernel of a step waits for its inputs, which a norm does and a split product does not.
        can_split = can_split and first.parts.before_attention is not None
        layer_bytes = sum(part.weight_NM.nbytes for part in products)
        self.split_rows = kernels.max_split_rows(dtype, layer_bytes) if can_split else 0
        device = spec.embedding_VM.device
        self._arrived_A = torch.zeros(ATTENDED_ROWS * spec.kv_heads, dtype=torch.int32, device=device)
        positions_P = torch.arange(spec.positions, device=device)
        self._tables_GPD = [self._angles_of(rope, positions_P) for rope in spec.ropes]

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that could not become views of joined ones."""
        return sum(layer.copied_bytes for layer in self.layers)

    def logits(self, inputs: StepInputs, kv_L2XKPD: torch.Tensor) -> torch.Tensor:
        """Write a batch's keys and values into their pages; return logits [K, V]."""
        spec = self.spec
        x_TM = F.embedding(inputs.ids_T, spec.embedding_VM)
        x_TM = x_TM if spec.embedding_scale == 1 else x_TM * spec.embedding_scale
        stream, angles_G2TE = Stream(x_TM, None, None), self._angles(inputs)
        by_row = len(x_TM) == 1 <= self.split_rows and inputs.chunks is None
        for layer, store_2XKPD in zip(self.layers, kv_L2XKPD, strict=True):
            if by_row and layer.plain_norms is not None:
                stream = self._layer_of_one_row(layer, layer.plain_norms, stream, inputs, store_2XKPD)
            else:
                stream = self._layer(layer, stream, inputs, angles_G2TE, store_2XKPD)
        x_TM, added, _ = stream
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

    def _layer(
        self,
        layer: FusedLayer,
        stream: Stream,
        inputs: StepInputs,
        angles_G2TE: Angles | None,
        store_2XKPD: torch.Tensor,
    ) -> Stream:
        """Compute a layer of a batch: products of few rows are split, others are cuBLAS's."""
        parts, x_TM = layer.parts, stream.x_TM
        split = len(x_TM) <= self.split_rows
        gate_up, down = layer.gate_up.weight_NM, parts.down.weight_NM
        normed_TM = self._norm(parts.before_attention, x_TM, stream.added)
        # A norm of heads is of whole sums, and `write_pages` takes no others.
        apart = not split or parts.q_norm is not None or angles_G2TE is not None
        heads = self._product(normed_TM, layer.qkv, not apart, gate_up)
        bias_N = None if apart else layer.qkv.bias_N
        mixed_TN = self._attend(
            layer, heads, bias_N, inputs, angles_G2TE, store_2XKPD, down if split else None
        )
        added = self._after(parts.after_attention, self._product(mixed_TN, parts.out, split))
        if self.spec.parallel:
            x_TM.add_(added, alpha=self.spec.residual_scale)
        else:
            normed_TM = self._norm(parts.before_mlp, x_TM, added)
        active_TF = self._gated(layer, normed_TM, split)
        return Stream(x_TM, self._after(parts.after_mlp, self._product(active_TF, parts.down, split)), None)

    def _layer_of_one_row(
        self,
        layer: FusedLayer,
        norms: tuple[Norm, Norm],
        stream: Stream,
        inputs: StepInputs,
        store_2XKPD: torch.Tensor,
    ) -> Stream:
        """Compute a layer of one token, whose products do what lies between them."""
        parts, x_1M, read_1M, unnormed = layer.parts, stream.x_TM, stream.x_TM, None
        gate_up, down, scale = layer.gate_up.weight_NM, parts.down.weight_NM, self.spec.residual_scale
        if stream.squares_P is None:
            read_1M = self._norm(norms[0], x_1M, stream.added)
        else:
            unnormed = kernels.Unnormed(norms[0], stream.squares_P)
        heads_1N = kernels.row_product(read_1M, layer.qkv.weight_NM, layer.qkv.bias_N, unnormed, gate_up)
        mixed_1N = self._attend(layer, heads_1N, None, inputs, None, store_2XKPD, down)
        squares_P = kernels.add_row_product(x_1M, mixed_1N, parts.out.weight_NM, scale)
        unnormed = kernels.Unnormed(norms[1], squares_P)
        active_1F = kernels.gated_row_product(x_1M, gate_up, parts.activation, unnormed)
        return Stream(x_1M, None, kernels.add_row_product(x_1M, active_1F, down, scale))

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

    def _product(
        self, x_TM: torch.Tensor, part: Linear, split: bool = False, ahead: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x @ weight.T + bias, [T, N]; if split, [S, T, N] in parts of the sum, without the bias.

        `ahead` is a weight that is read soon after, for a split product to ask for.
        """
        if split:
            return kernels.split_k_product(x_TM, part.weight_NM, ahead)
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
        heads: torch.Tensor,
        bias_N: torch.Tensor | None,
        inputs: StepInputs,
        angles_G2TE: Angles | None,
        store_2XKPD: torch.Tensor,
        ahead: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write a layer's keys and values into their pages; return what its heads mix, [T, H * D].

        Args:
            heads: queries, keys and values side by side, [T, N]; or [S, T, N] in parts of a sum that lack
                bias_N.
            ahead: a weight that is read soon after.
        """
        parts, options, apart = layer.parts, layer.parts.options, inputs.written_apart
        q, k, v = heads.unflatten(-1, (-1, self.spec.head_dim)).split(self._heads, -2)
        if parts.q_norm is not None and parts.k_norm is not None:
            q, k = self._head_norm(q, parts.q_norm), self._head_norm(k, parts.k_norm)
        keys, values = store_2XKPD
        how = options.scale, options.window, options.softcap
        out_THD = keys.new_empty(heads.shape[-2], self.spec.heads, self.spec.head_dim)
        q_THD = q
        if angles_G2TE is not None:
            cos_TE, sin_TE = angles_G2TE[layer.rope]
            q_THD, slots_T = torch.empty_like(out_THD), inputs.slots_T[apart]
            new = q[apart], k[apart], v[apart]
            kernels.write_pages(*new, cos_TE, sin_TE, slots_T, keys, values, q_THD[apart])
        for at in range(0, len(inputs.lengths_B), ATTENDED_ROWS):
            some = slice(at, min(at + ATTENDED_ROWS, len(inputs.lengths_B)))
            given, rows = q_THD[some], None
            if inputs.rows_are_new:
                given, k_, v_ = (x[..., some, :, :] for x in (q, k, v))
                rows = kernels.NewTokens(
                    k_, v_, inputs.positions_T[some], self._tables_GPD[layer.rope], bias_N
                )
            kernels.attend_rows(
                given, keys, values, inputs.tables_RN, inputs.lengths_B[some], inputs.max_length,
                self._arrived_A, *how, inputs.lines_B[some], inputs.split, rows, out_THD[some], ahead,
            )  # fmt: skip
        if inputs.chunks is not None:
            kernels.attend_chunks(q_THD, keys, values, *inputs.chunks, *how, out_THD)
        return out_THD.flatten(1)

    def _head_norm(self, x_THD: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return the norm of each head, or of all heads together."""
        if self.spec.has_whole_head_norms:
            return kernels.norm(x_THD.flatten(-2), norm).view(x_THD.shape)
        return kernels.norm(x_THD, norm)

    def _angles(self, inputs: StepInputs) -> Angles | None:
        """Return cosines and sines [T, D / 2] by each rope of the tokens that `write_pages` takes; None
        without any."""
        positions_T = inputs.positions_T[inputs.written_apart]
        if not len(positions_T):
            return None
        half, rows = self.spec.head_dim // 2, (F.embedding(positions_T, table) for table in self._tables_GPD)
        return [(angles_TD[:, :half], angles_TD[:, half:]) for angles_TD in rows]

    def _angles_of(self, rope: Rope | None, positions_P: torch.Tensor) -> torch.Tensor:
        """Return the angles of positions as the model has them, [P, D]: cosines, then sines."""
        angles_2PE = head_angles(rope, positions_P, self.spec.head_dim)
        return torch.cat(list(angles_2PE), -1).to(self.spec.embedding_VM.dtype)
