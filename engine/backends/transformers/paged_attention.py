"""Attention over pages with torch alone: only the useful products, and no mask over everybody.

T tokens of the step, H query heads, K KV heads, D head size, L pages, P page size, C context of a chunk.

Tokens that are alone in a step are computed together (`row_attention`); chunks go through torch's
fused kernel one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import compress

import numpy as np
import torch
import torch.nn.functional as F

from engine.backends.transformers.row_attention import Rows, attend_rows, by_sum, in_order, rows_of
from engine.backends.zeros import zeros
from engine.models.attention_trace import Options
from engine.models.decoder_spec import VECTOR
from engine.step import Span


@dataclass(frozen=True, slots=True)
class Store:
    """Keys and values of one layer: keys [L, K, D, P], dimension by dimension, and values [L, K, B, P, E].

    A value's D dimensions are B blocks of E, which fill a vector: whatever is added up then lies side by
    side.
    """

    keys_LKDP: torch.Tensor
    values_LKBPE: torch.Tensor

    @classmethod
    def zeros(cls, sizes: tuple[int, int, int, int, int], like: torch.Tensor) -> Store:
        """For L pages, K heads, P positions, and the D of keys and of values.

        Zeros, since what a mask hides is multiplied too, and 0 hides no NaN.
        """
        pages, heads, size, key_dim, value_dim = sizes
        blocks = value_dim // VECTOR if value_dim % VECTOR == 0 else 1
        values = (pages, heads, blocks, size, value_dim // blocks)
        return cls(zeros((pages, heads, key_dim, size), like), zeros(values, like))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.keys_LKDP[0].nbytes + self.values_LKBPE[0].nbytes

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        self.keys_LKDP[pages], self.values_LKBPE[pages] = 0, 0

    def write(
        self, pages_T: torch.Tensor, offsets_T: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> None:
        """Put a key and a value a token where it belongs."""
        self.keys_LKDP[pages_T, :, :, offsets_T] = k_TKD
        self.values_LKBPE[pages_T, :, :, offsets_T] = v_TKD.unflatten(2, (self.values_LKBPE.shape[2], -1))

    def context(self, pages_C: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` positions of these pages, [K, C, D] each."""
        keys_KCD = self.keys_LKDP[pages_C].permute(1, 0, 3, 2).flatten(1, 2)
        values_KCD = self.values_LKBPE[pages_C].permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)
        return keys_KCD[:, :length], values_KCD[:, :length]


class PackedStep:
    """One step's tokens and the pages they read and write.

    Args:
        stores: keys and values, one a layer.
        spans: the requests of the step, in the order of their tokens.
        one_by_one: treat every token as a row of its own, so that a token's result does not depend on how a
            prompt was cut into chunks or on what else runs.
    """

    def __init__(self, stores: list[Store], spans: list[Span], one_by_one: bool = False) -> None:
        self.stores, self.one_by_one = stores, one_by_one
        keys_LKDP = stores[0].keys_LKDP
        self.page_size, self.device = keys_LKDP.shape[3], keys_LKDP.device
        self._wide = torch.promote_types(keys_LKDP.dtype, torch.float32)
        apart = [one_by_one or p.end - p.begin == 1 for p in spans]
        single = list(compress(spans, apart))
        self.chunks = [span for span, alone in zip(spans, apart, strict=True) if not alone]
        self._tables = [(p.pages, p.computed + i) for p in single for i in range(p.end - p.begin)]
        where = [np.arange(p.computed, p.computed + p.end - p.begin) for p in spans]
        pages = [np.asarray(p.pages)[at // self.page_size] for p, at in zip(spans, where, strict=True)]
        self.positions_T = torch.from_numpy(np.concatenate(where)).to(self.device)
        self.pages_T = torch.from_numpy(np.concatenate(pages)).to(self.device)
        self.offsets_T = self.positions_T % self.page_size
        alone = [t for p in single for t in range(p.begin, p.end)]
        self.tokens_R = torch.tensor(alone, dtype=torch.long, device=self.device)
        self.page_R, self.offset_R = self.pages_T[self.tokens_R], self.offsets_T[self.tokens_R]
        self._contexts = [self._context(span) if span.computed else None for span in self.chunks]
        self._rows: dict[int | None, Rows] = {}

    def attend(
        self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """Write the step's keys and values into their pages and attend; gives [T, H, D].

        The queries come scaled already: `options.scale` is not applied.
        """
        if not self.chunks:
            return self._attend_rows(layer, q_THD, k_TKD, v_TKD, options)
        out_THD = q_THD.new_empty(*q_THD.shape[:2], v_TKD.shape[2])
        out_RHD = out_THD[:0]
        if self._tables:
            q_RHD, k_RKD, v_RKD = (x_TD[self.tokens_R] for x_TD in (q_THD, k_TKD, v_TKD))
            out_RHD = self._attend_rows(layer, q_RHD, k_RKD, v_RKD, options)
        store = self.stores[layer]
        out_THD[self.tokens_R] = out_RHD
        # rows have done it already, but it is one call
        store.write(self.pages_T, self.offsets_T, k_TKD, v_TKD)
        for span, pages in zip(self.chunks, self._contexts, strict=True):
            rows, length = slice(span.begin, span.end), span.computed + span.end - span.begin
            if pages is None:
                k_KCD, v_KCD = k_TKD[rows].transpose(0, 1), v_TKD[rows].transpose(0, 1)
            else:
                k_KCD, v_KCD = store.context(pages, length)
            out_THD[rows] = _attend_chunk(q_THD[rows].transpose(0, 1), k_KCD, v_KCD, options).transpose(0, 1)
        return out_THD

    def pages(self, layer: int, window: int | None) -> tuple[torch.Tensor, ...]:
        """What `attend_rows` takes of a layer after the rows' own queries, keys and values."""
        if window not in self._rows:
            self._rows[window] = rows_of(self._tables, self.page_size, window, self._wide, self.device)
        store, rows = self.stores[layer], self._rows[window]
        where = (self.page_R, self.offset_R, rows.page_N, rows.owner_N, rows.bias_NP, rows.place_XR)
        return store.keys_LKDP, store.values_LKBPE, *where

    def _context(self, span: Span) -> torch.Tensor:
        """The ids of the pages that hold a span's request up to its last token."""
        length = span.computed + span.end - span.begin
        return torch.tensor(span.pages[: -(-length // self.page_size)], device=self.device)

    def _attend_rows(
        self, layer: int, q_RHD: torch.Tensor, k_RKD: torch.Tensor, v_RKD: torch.Tensor, options: Options
    ) -> torch.Tensor:
        tensors = (q_RHD, k_RKD, v_RKD, *self.pages(layer, options.window))
        add_up = in_order if self.one_by_one else by_sum
        return attend_rows(*tensors, softcap=options.softcap, sink_H=options.sink_H, add_up=add_up)


def _attend_chunk(
    q_HTD: torch.Tensor, k_KCD: torch.Tensor, v_KCD: torch.Tensor, options: Options
) -> torch.Tensor:
    """Causal attention of the last T of C positions by scaled queries, [H, T, D]."""
    tokens, context, kv_heads = q_HTD.shape[1], k_KCD.shape[1], k_KCD.shape[0]
    window, sink_H = options.window, options.sink_H
    groups = q_HTD.shape[0] // kv_heads
    plain = options.softcap is None and sink_H is None
    fused = partial(
        F.scaled_dot_product_attention, q_HTD[None], k_KCD[None], v_KCD[None], scale=1.0, enable_gqa=True
    )
    if plain and tokens == context and (window is None or window >= context):
        return fused(is_causal=True)[0]
    query_at = torch.arange(context - tokens, context, device=q_HTD.device)[:, None]
    key_at = torch.arange(context, device=q_HTD.device)
    seen_TC = (key_at <= query_at) & (key_at > (query_at - window if window else -1))
    if plain:
        return fused(attn_mask=seen_TC)[0]
    q_KGTD = q_HTD.unflatten(0, (kv_heads, groups))
    k_KGCD, v_KGCD = (x[:, None].expand(-1, groups, -1, -1) for x in (k_KCD, v_KCD))
    wide = torch.promote_types(q_HTD.dtype, torch.float32)
    scores_KGTC = _capped((q_KGTD @ k_KGCD.transpose(2, 3)).to(wide), options.softcap)
    scores_KGTC = scores_KGTC.masked_fill(~seen_TC, -torch.inf)
    if sink_H is not None:
        sink_KGT1 = sink_H.to(wide).view(-1, groups, 1, 1).expand(-1, -1, tokens, 1)
        scores_KGTC = torch.cat([scores_KGTC, sink_KGT1], -1)
    weights_KGTC = scores_KGTC.softmax(-1)[..., :context].to(q_HTD.dtype)
    return (weights_KGTC @ v_KGCD).flatten(0, 1)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores squashed to within +-softcap (Gemma 2)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
