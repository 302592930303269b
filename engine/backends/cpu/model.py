"""A decoder on a CPU, in float32, bfloat16 or int8: its folded weights, its pages, and its steps.

Whether a model really computes what its DecoderSpec says is found by comparing logits, not by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import from_dtype

from engine.backends import Backend
from engine.backends.cpu import VECTOR
from engine.backends.cpu.attention import QUERIES, STRETCH, Heads
from engine.backends.cpu.fold import filled, shape_of, weights_of
from engine.backends.cpu.forward import PHASES_PER_LAYER, Panels, Plan, Space, forward
from engine.backends.cpu.gemm import NUMBERS, PARTS, WIDE, x_item_of
from engine.backends.cpu.matrix_tile import HAS_MATRIX_UNIT, STEPS
from engine.backends.cpu.paged_tile import PART
from engine.backends.cpu.simd import HAS_QUAD_PRODUCTS, ITEM
from engine.backends.cpu.threads import team
from engine.backends.cpu.tile import K_UNROLL, QUAD, X_PARTS, ZERO_BYTE
from engine.backends.cpu.x_rows import BLOCK_DEPTH, BLOCK_ROWS, LEVELS
from engine.backends.zeros import zeros
from engine.models.decoder_parts import head_angles
from engine.models.decoder_spec import DecoderSpec
from engine.step import Batch


class CompiledDecoder(Backend):
    """Runs steps of a decoder that `can_compile`.

    Args:
        spec: what the model computes. The model is not changed, and its embedding is shared.
        page_size: positions of a page of keys and values; `allocate_kv` makes room for some.
    """

    def __init__(self, spec: DecoderSpec, page_size: int) -> None:
        self.shape, self.weights = shape_of(spec, page_size), weights_of(spec)
        if HAS_MATRIX_UNIT and all(size % STEPS == 0 for size in self._inner_sizes):
            self._change_products(lambda panels: panels._replace(numbers=_for_matrix_unit(panels.numbers)))
        self.vocabulary = len(spec.head.weight_NM)
        self._ropes, self._most = spec.ropes, spec.positions
        self._angles_2GPE = _room(2, len(self._ropes), 0, spec.head_dim // 2)
        self._page_size = page_size
        is_bfloat16 = self.weights.qkv.numbers.itemsize == 2
        self._kv_dtype = torch.uint16 if is_bfloat16 else torch.float32  # uint16: NumPy has no bfloat16
        self.use(torch.get_num_threads())

    def use(self, threads: int) -> None:
        """Divide steps among so many threads."""
        self._team, size = team(threads), self.shape.head_dim
        self._space: Space | None = None
        page_parts = -(-self._page_size // PART)
        pages = max(STRETCH // PART // page_parts, 1)  # of a stretch
        rows = max(QUERIES, self.shape.heads // self.shape.kv_heads)
        parts = -(-pages * page_parts // PARTS) * PARTS  # of keys: whole tiles
        self._heads = Heads(
            keys_S2A=_room(threads, 2, parts, dtype=torch.int64),
            values_S2A=_room(threads, 2, pages * PARTS, dtype=torch.int64),
            queries_SRD=_room(threads, rows, size),
            scores_SRP=_room(threads, rows, parts * PART),
            mixed_SRD=_room(threads, rows, -(-size // (PARTS * PART)) * PARTS * PART),
            peaks_SR=_room(threads, rows),
            totals_SR=_room(threads, rows),
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights of products, which the model holds too."""
        products = [part for part in self.weights if isinstance(part, Panels)]
        return sum(part.numbers.nbytes + part.scales_LCW.nbytes for part in products)

    def quantize(self) -> None:
        """Turn the weights of products into int8: one scale an output, to nearest, symmetric. Pages that are
        allocated from now on are in bfloat16, whose rounding is finer than that of the weights.

        Where the processor multiplies four bytes at a time, and inner sizes are whole vectors, inputs of
        products become integers as well: see `engine.backends.cpu.x_rows`.
        """
        quads = HAS_QUAD_PRODUCTS and all(size % VECTOR == 0 for size in self._inner_sizes)
        self._change_products(lambda panels: _rounded(panels, quads))
        self._kv_dtype = torch.uint16

    def _change_products(self, change: Callable[[Panels], Panels]) -> None:
        """Change the weights of products, one after the other, so that no more is held twice."""
        self._space = None
        for name in ("qkv", "out", "gate_up", "down", "head"):
            changed: dict[str, Any] = {name: change(getattr(self.weights, name))}
            self.weights = self.weights._replace(**changed)

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, all of them zero; in bfloat16 unless weights
        are in float32.

        Vectors of keys are read beyond the end of a page, several positions of values at a time, and values
        of more dimensions than there are. What lies there does not count, but must be memory of this store,
        and values at positions that fill up a page must be zero. In bfloat16, pairs of a key's dimensions lie
        together, and of values those of two positions: the inner steps of products.
        """
        heads = self.shape.layers, pages, self.shape.kv_heads
        dim, size = self.shape.head_dim, self._page_size
        like, steps = torch.empty(0, dtype=self._kv_dtype), ITEM // self._kv_dtype.itemsize
        count, read = math.prod(heads) * dim * size, K_UNROLL * steps
        keys = zeros((count + PART * steps,), like).numpy()
        self.keys_LXKDPI = keys[:count].reshape(*heads, dim // steps, size, steps)
        shape = *heads, dim // PART, -(-size // read) * read // steps, PART, steps
        count = math.prod(shape)
        values = zeros((count + (PARTS - 1) * math.prod(shape[4:]),), like).numpy()
        self.values_LXKBPVI = values[:count].reshape(shape)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.keys_LXKDPI[:, 0].nbytes + self.values_LXKBPVI[:, 0].nbytes

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        self.keys_LXKDPI[:, pages], self.values_LXKBPVI[:, pages] = 0, 0

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
        logits_RV = torch.empty(len(batch.wanted), filled(self.vocabulary))
        self._team.run(
            forward, self.weights, shape, plan, self.keys_LXKDPI, self.values_LXKBPVI, self._space_for(count),
            logits_RV.numpy(),
        )  # fmt: skip
        return logits_RV[:, : self.vocabulary]

    def _space_for(self, tokens: int) -> Space:
        """Return memory for a step of so many tokens: that of steps before if it is enough, else more."""
        if self._space is None or len(self._space.x_TM) < tokens:
            self._space = None  # never both
            shape, threads, (slices, rows, row_bytes) = self.shape, self._team.size, self._rows_made()
            self._space = Space(
                x_TM=_room(tokens, filled(shape.width)),
                qkv_TN=_room(tokens, filled((shape.heads + 2 * shape.kv_heads) * shape.head_dim)),
                mixed_TN=_room(tokens, filled(shape.heads * shape.head_dim)),
                inner_TF=_room(tokens, filled(shape.inner)),
                added_TM=_room(tokens if self.weights.after_attention_LM.size else 0, filled(shape.width)),
                counts=_room(8 + (PHASES_PER_LAYER * shape.layers + 1) * threads, dtype=torch.int64),
                factors_ST=_room(threads, BLOCK_ROWS),
                starts_SZU=_room(threads, slices, rows, dtype=torch.int32),
                rows_SUY=_room(threads, rows, row_bytes, dtype=torch.int8),
                both_S2TW=_room(threads, 2, BLOCK_ROWS, WIDE),
                heads=self._heads,
            )
        return self._space

    @property
    def _inner_sizes(self) -> tuple[int, ...]:
        """Inner steps of products."""
        return self.shape.width, self.shape.heads * self.shape.head_dim, self.shape.inner

    def _rows_made(self) -> tuple[int, int, int]:
        """Return the slices, rows and bytes of a row that a thread makes for products: see x_rows.Own."""
        number = NUMBERS[from_dtype(self.weights.qkv.numbers.dtype)]
        longest, item, parts = filled(max(self._inner_sizes)), x_item_of(number), X_PARTS.get(number, 1)
        return (-(-longest // BLOCK_DEPTH), parts * BLOCK_ROWS, item * longest) if item < ITEM else (0, 0, 0)

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


def _room(*sizes: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Return memory that begins with a cache line. With AVX-512, a row of a panel is whole lines then, and
    threads that write to panels side by side share none."""
    return torch.empty(sizes, dtype=dtype).numpy()


def _for_matrix_unit(numbers: np.ndarray) -> np.ndarray:
    """Return bfloat16 under the dtype by which products know that a matrix unit multiplies it."""
    return numbers.view(np.int16) if numbers.dtype == np.uint16 else numbers


def _rounded(panels: Panels, quads: bool) -> Panels:
    """Return panels of float32 as int8, in quads of inner steps if asked for."""
    numbers = torch.from_numpy(panels.numbers)
    scales_LCW = (numbers.abs().amax(2) / LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded = zeros(tuple(numbers.shape), torch.empty(0, dtype=torch.uint8 if quads else torch.int8))
    for layer, scales_CW in enumerate(scales_LCW):
        whole_CMW = (numbers[layer] / scales_CW[:, None]).round_()
        if quads:
            whole_CQW4 = (whole_CMW + ZERO_BYTE).unflatten(1, (-1, QUAD.count)).transpose(2, 3)
            rounded[layer].view(whole_CQW4.shape).copy_(whole_CQW4)
        else:
            rounded[layer] = whole_CMW
    return Panels(rounded.numpy(), scales_LCW.numpy())
