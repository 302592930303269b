"""Attention over pages with torch alone: only the useful products, nothing gathered that can be read in place.

T tokens of the step, H query heads, K KV heads, G = H / K, D head size, L pages, P page size, R rows of one token,
N pages that these rows read, C context of a chunk.

Rows of one token are batched page by page: one matrix product over all pages in use, in place when they lie close
together, and one with the values; each row's softmax is put together from its pages (flash-decoding's split, with a
page as the split). Longer chunks go through the fused kernel one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# Reading pages nobody needs, to avoid copying those somebody does, pays while at least this share is needed.
DENSE = 0.4


@dataclass(frozen=True, slots=True)
class Piece:
    """The next tokens of one request: where they lie in the step, how many precede them, and the request's pages."""

    begin: int
    end: int
    computed: int
    pages: list[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of one token read pages, for one sliding window."""

    source: slice | torch.Tensor  # the N pages read: a range of the store, or page ids
    owner_N: torch.Tensor  # the row that each belongs to
    bias_NP: torch.Tensor  # 0 where a position counts for its row, -inf elsewhere
    place_RX: torch.Tensor  # each row's pages among the N; N itself after its last


class PackedStep:
    """One step's tokens and the pages they read and write.

    Args:
        keys_LKPD, values_LKPD: the store, one tensor a layer.
        pieces: the requests of the step, in the order of their tokens.
        one_by_one: treat every token as a row of its own, so that a token's result does not depend on how a prompt
            was cut into chunks or on what else runs (and pages are always gathered, in order).
    """

    def __init__(
        self,
        keys_LKPD: list[torch.Tensor],
        values_LKPD: list[torch.Tensor],
        pieces: list[Piece],
        one_by_one: bool = False,
    ) -> None:
        self.keys, self.values = keys_LKPD, values_LKPD
        self.one_by_one = one_by_one
        self.page_size = keys_LKPD[0].shape[2]
        single = [p for p in pieces if one_by_one or p.end - p.begin == 1]
        self.chunks = [p for p in pieces if not (one_by_one or p.end - p.begin == 1)]
        self.rows = [(p.pages, p.computed + i + 1) for p in single for i in range(p.end - p.begin)]
        where = [np.arange(p.computed, p.computed + p.end - p.begin) for p in pieces]
        pages = [np.asarray(p.pages)[at // self.page_size] for p, at in zip(pieces, where, strict=True)]
        device = keys_LKPD[0].device
        self.positions_T = torch.from_numpy(np.concatenate(where)).to(device)
        self.pages_T = torch.from_numpy(np.concatenate(pages)).to(device)
        self.offsets_T = self.positions_T % self.page_size
        self.tokens_R = torch.tensor(
            [t for p in single for t in range(p.begin, p.end)], dtype=torch.long, device=device
        )
        self._by_window: dict[int | None, Rows] = {}

    def attend(
        self,
        layer: int,
        q_HTD: torch.Tensor,
        k_KTD: torch.Tensor,
        v_KTD: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the step's keys and values into their pages and attend; gives [T, H, D]."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.pages_T, :, self.offsets_T] = k_KTD.transpose(0, 1)
        values[self.pages_T, :, self.offsets_T] = v_KTD.transpose(0, 1)
        out_THD = q_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], v_KTD.shape[2])
        if self.rows:
            q_HRD = q_HTD[:, self.tokens_R] if self.chunks else q_HTD
            out_RHD = self._attend_rows(keys, values, q_HRD, scale, window, softcap, sink_H)
            if not self.chunks:
                return out_RHD
            out_THD[self.tokens_R] = out_RHD
        for piece in self.chunks:
            span = slice(piece.begin, piece.end)
            if piece.computed:
                k, v = (_context(store, piece, self.page_size) for store in (keys, values))
            else:
                k, v = k_KTD[:, span], v_KTD[:, span]
            out_THD[span] = _attend_chunk(q_HTD[:, span], k, v, scale, window, softcap, sink_H).transpose(0, 1)
        return out_THD

    def _attend_rows(
        self,
        keys_LKPD: torch.Tensor,
        values_LKPD: torch.Tensor,
        q_HRD: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        if window not in self._by_window:
            self._by_window[window] = self._rows(window)
        rows = self._by_window[window]
        k_NKPD, v_NKPD = keys_LKPD[rows.source], values_LKPD[rows.source]
        n, kv_heads, size, dim = k_NKPD.shape
        count, groups = len(rows.place_RX), q_HRD.shape[0] // kv_heads
        wide = torch.promote_types(q_HRD.dtype, torch.float32)
        q_NKGD = (q_HRD * scale).transpose(0, 1).reshape(count, kv_heads, groups, dim)[rows.owner_N]
        scores_NKGP = torch.bmm(q_NKGD.flatten(0, 1), k_NKPD.flatten(0, 1).transpose(1, 2)).to(wide)
        scores_NKGP = _capped(scores_NKGP.view(n, kv_heads, groups, size), softcap) + rows.bias_NP[:, None, None]
        peak_RKG = F.pad(scores_NKGP.amax(-1), (0, 0, 0, 0, 0, 1), value=-torch.inf)[rows.place_RX].amax(1)
        if sink_H is not None:
            peak_RKG = torch.maximum(peak_RKG, sink_H.to(wide).view(kv_heads, groups))
        weights_NKGP = (scores_NKGP - peak_RKG[rows.owner_N][..., None]).exp_()
        total_RKG = torch.zeros_like(peak_RKG).index_add_(0, rows.owner_N, weights_NKGP.sum(-1))
        if sink_H is not None:  # it takes its share of the weight and gives no value
            total_RKG += (sink_H.to(wide).view(kv_heads, groups) - peak_RKG).exp()
        out_NKGD = torch.bmm(weights_NKGP.to(v_NKPD.dtype).flatten(0, 1), v_NKPD.flatten(0, 1))
        out_NKGD = out_NKGD.view(n, kv_heads, groups, -1).to(wide)
        out_RKGD = out_NKGD.new_zeros(count, *out_NKGD.shape[1:]).index_add_(0, rows.owner_N, out_NKGD)
        return (out_RKGD / total_RKG[..., None]).to(q_HRD.dtype).flatten(1, 2)

    def _rows(self, window: int | None) -> Rows:
        """Which pages each row reads, and which of their positions count for it."""
        size, count = self.page_size, len(self.rows)
        length_R = np.array([length for _, length in self.rows])
        first_R = np.maximum(0, length_R - window) // size if window else np.zeros_like(length_R)
        pages_R = -(-length_R // size) - first_R
        owner_N = np.repeat(np.arange(count), pages_R)
        column_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(pages_R) - pages_R, pages_R)
        tables = zip(self.rows, first_R, first_R + pages_R, strict=True)
        page_N = np.concatenate([np.asarray(pages[a:b]) for (pages, _), a, b in tables])
        at_NP = ((first_R[owner_N] + column_N) * size)[:, None] + np.arange(size)
        length_N1 = length_R[owner_N][:, None]
        hidden_NP = (at_NP >= length_N1) | (at_NP < (length_N1 - window if window else 0))
        low, high = int(page_N.min()), int(page_N.max()) + 1
        device = self.keys[0].device
        source: slice | torch.Tensor = torch.from_numpy(page_N).to(device)
        place_N, place_RX = np.arange(len(page_N)), np.empty((count, int(pages_R.max())), dtype=np.int64)
        owners, hidden_LP = owner_N, hidden_NP
        shared = len(np.unique(page_N)) < len(page_N)
        if not (self.one_by_one or shared or len(page_N) < DENSE * (high - low)):
            source, place_N = slice(low, high), page_N - low
            owners, hidden_LP = np.zeros(high - low, dtype=np.int64), np.ones((high - low, size), dtype=bool)
            owners[place_N], hidden_LP[place_N] = owner_N, hidden_NP  # what nobody reads is hidden from the first row
        place_RX.fill(len(owners))
        place_RX[owner_N, column_N] = place_N
        bias_NP = torch.zeros(hidden_LP.shape, dtype=torch.promote_types(self.keys[0].dtype, torch.float32))
        bias_NP.masked_fill_(torch.from_numpy(hidden_LP), -torch.inf)
        owner, place = (torch.from_numpy(array).to(device) for array in (owners, place_RX))
        return Rows(source, owner, bias_NP.to(device), place)


def _context(store_LKPD: torch.Tensor, piece: Piece, size: int) -> torch.Tensor:
    """All keys or values of a piece's request up to its last token, side by side: [K, C, D]."""
    length = piece.computed + piece.end - piece.begin
    pages = torch.tensor(piece.pages[: -(-length // size)], device=store_LKPD.device)
    return store_LKPD[pages].transpose(0, 1).flatten(1, 2)[:, :length]


def _attend_chunk(
    q_HTD: torch.Tensor,
    k_KCD: torch.Tensor,
    v_KCD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_H: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of the last T of C positions, [H, T, D]."""
    tokens, context, groups = q_HTD.shape[1], k_KCD.shape[1], q_HTD.shape[0] // k_KCD.shape[0]
    plain = softcap is None and sink_H is None
    q, k, v = q_HTD[None], k_KCD[None], v_KCD[None]
    if plain and tokens == context and (window is None or window >= context):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)[0]
    query_at = torch.arange(context - tokens, context, device=q.device)[:, None]
    key_at = torch.arange(context, device=q.device)
    seen_TC = (key_at <= query_at) & (key_at > (query_at - window if window else -1))
    if plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TC, scale=scale, enable_gqa=groups > 1)[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores_KGTC = (q_HTD * scale).unflatten(0, (-1, groups)) @ k_KCD[:, None].transpose(2, 3)
    scores_KGTC = _capped(scores_KGTC.to(wide), softcap).masked_fill(~seen_TC, -torch.inf)
    if sink_H is not None:
        sink_KGT1 = sink_H.to(wide).view(-1, groups, 1, 1).expand(-1, -1, tokens, 1)
        scores_KGTC = torch.cat([scores_KGTC, sink_KGT1], -1)
    weights_KGTC = scores_KGTC.softmax(-1)[..., :context].to(v.dtype)
    return (weights_KGTC @ v_KCD[:, None]).flatten(0, 1)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores squashed to within +-softcap (Gemma 2)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
