"""A decoder on a CPU, in float32, bfloat16 or int8: its folded weights, its pages, and its steps.

Whether a model really computes what its DecoderSpec says is found by comparing logits, not by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from engine.backends import Backend
from engine.backends.cpu.attention import QUERIES, SPAN, Heads
from engine.backends.cpu.fold import filled, shape_of, weights_of
from engine.backends.cpu.forward import PHASES_PER_LAYER, Panels, Plan, Space, forward
from engine.backends.cpu.gemm import NARROW, WIDE
from engine.backends.cpu.linear import BLOCK_ROWS
from engine.backends.cpu.simd import HAS_PAIR_PRODUCTS
from engine.backends.cpu.threads import team
from engine.backends.zeros import zeros
from engine.models.decoder_parts import head_angles
from engine.models.decoder_spec import DecoderSpec
from engine.step import Batch

LEVELS = 127  # of an int8 weight, on either side of 0


class CompiledDecoder(Backend):
    """Runs steps of a decoder that `can_compile`.

    Args:
        spec: what the model computes. The model is not changed, and its embedding is shared.
        page_size: positions of a page of keys and values; `allocate_kv` makes room for some.
    """

    def __init__(self, spec: DecoderSpec, page_size: int) -> None:
        self.shape, self.weights = shape_of(spec, page_size), weights_of(spec)
        self.vocabulary = len(spec.head.weight_NM)
        self._ropes, self._most = spec.ropes, spec.positions
        self._angles_2GPE = _room(2, len(self._ropes), 0, spec.head_dim // 2)
        self._page_size = page_size
        self.use(torch.get_num_threads())

    def use(self, threads: int) -> None:
        """Divide steps among so many threads."""
        self._team, size = team(threads), self.shape.head_dim
        filled_page = -(-self._page_size // NARROW) * NARROW
        rows = max(QUERIES, self.shape.heads // self.shape.kv_heads)
        self._heads = Heads(
            queries_SRD=_room(threads, rows, size),
            scores_SRP=_room(threads, rows, max(SPAN // filled_page, 1) * filled_page),
            mixed_SRD=_room(threads, rows, size),
            peaks_SR=_room(threads, rows),
            totals_SR=_room(threads, rows),
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights of products, which the model holds too."""
        products = [part for part in self.weights if isinstance(part, Panels)]
        return sum(part.numbers.nbytes + part.scales_LCW.nbytes for part in products)

    def quantize(self) -> None:
        """Turn the weights of products into int8: one scale an output, to nearest, symmetric."""
        # one after the other, so that no more is held twice
        for name in ("qkv", "out", "gate_up", "down", "head"):
            rounded: dict[str, Any] = {name: _rounded(getattr(self.weights, name))}
            self.weights = self.weights._replace(**rounded)

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, all of them zero.

        Vectors of keys are read beyond the end of a page, and values in pairs of positions: what lies there
        does not count, but must be memory of this store, and in values zero.
        """
        shape = self.shape.layers, pages, self.shape.kv_heads
        dim, size = self.shape.head_dim, self._page_size
        count = math.prod(shape) * dim * size
        keys = zeros((count + NARROW,), torch.empty(0)).numpy()
        self.keys_LXKDP = keys[:count].reshape(*shape, dim, size)
        pairs = (dim // NARROW, size + size % 2, NARROW)
        self.values_LXKBPV = zeros((*shape, *pairs), torch.empty(0)).numpy()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.keys_LXKDP[:, 0].nbytes + self.values_LXKBPV[:, 0].nbytes

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        self.keys_LXKDP[:, pages], self.values_LXKBPV[:, pages] = 0, 0

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits [R, V] of a batch's wanted tokens."""
        shape, spans, count = self.shape, batch.spans, len(batch.tokens)
        if batch.position_ids is None:
            places = [np.arange(span.computed, span.computed + span.end - span.begin) for span in spans]
            angles_2GTE = self._rope_angles(np.concatenate(places))
        else:
            angles_2GTE = self._angles(torch.tensor(batch.position_ids))
        plan = Plan(
            ids_T=np.array(batch.tokens, np.int64),
            begin_J=np.array([*(span.begin for span in spans), count], np.int64),
            computed_J=np.array([span.computed for span in spans], np.int64),
            table_J=np.cumsum([0, *(len(span.pages) for span in spans)], dtype=np.int64),
            pages=np.concatenate([np.asarray(span.pages, np.int64) for span in spans]),
            cos_GTE=angles_2GTE[0],
            sin_GTE=angles_2GTE[1],
            wanted_R=np.array(batch.wanted, np.int64),
        )
        size, start = self._team.size, self._team.start
        logits_RV = torch.empty(len(batch.wanted), filled(self.vocabulary))
        space = Space(
            x_TM=_room(count, filled(shape.width)),
            qkv_TN=_room(count, filled((shape.heads + 2 * shape.kv_heads) * shape.head_dim)),
            mixed_TN=_room(count, filled(shape.heads * shape.head_dim)),
            inner_TF=_room(count, filled(shape.inner)),
            added_TM=_room(count if self.weights.after_attention_LM.size else 0, filled(shape.width)),
            logits_RV=logits_RV.numpy(),
            counts=np.zeros(16 + PHASES_PER_LAYER * shape.layers, np.int64),
            norms_ST=_room(size, BLOCK_ROWS),
            rows_STM=np.empty((size, *self._narrowed(count)), np.uint16),
            both_S2TW=_room(size, 2, BLOCK_ROWS, WIDE),
            heads=self._heads,
        )
        keys, values = self.keys_LXKDP, self.values_LXKBPV
        self._team.run(lambda i: forward(i, size, start, self.weights, shape, plan, keys, values, space))
        return logits_RV[:, : self.vocabulary]

    def _narrowed(self, rows: int) -> tuple[int, int]:
        """Return the sizes of what a thread needs for rows in bfloat16."""
        if not HAS_PAIR_PRODUCTS or self.weights.qkv.numbers.dtype != np.uint16:
            return 0, 0
        shape = self.shape
        return min(rows, BLOCK_ROWS), filled(max(shape.width, shape.heads * shape.head_dim, shape.inner))

    def _rope_angles(self, positions_T: np.ndarray) -> np.ndarray:
        """Return cosines and sines of each way in which layers rotate, [2, G, T, E]."""
        needed = int(positions_T.max()) + 1
        if needed > self._angles_2GPE.shape[2]:
            more = torch.arange(max(needed, min(2 * needed, self._most)))
            self._angles_2GPE = self._angles(more)
        return self._angles_2GPE.take(positions_T, axis=2)  # in C's order: another would be compiled for

    def _angles(self, positions_T: torch.Tensor) -> np.ndarray:
        """Return them as the model's own modules compute them."""
        dim = self.shape.head_dim
        return torch.stack([head_angles(rope, positions_T, dim) for rope in self._ropes], 1).numpy()


def _room(*sizes: int) -> np.ndarray:
    return np.empty(sizes, np.float32)


def _rounded(panels: Panels) -> Panels:
    numbers = torch.from_numpy(panels.numbers)
    scales_LCW = (numbers.abs().amax(2) / LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded = torch.empty(numbers.shape, dtype=torch.int8)
    for layer, scales_CW in enumerate(scales_LCW):
        rounded[layer] = (numbers[layer] / scales_CW[:, None]).round_()
    return Panels(rounded.numpy(), scales_LCW.numpy())
