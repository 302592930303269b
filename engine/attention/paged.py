"""Attention over pages with torch alone: only the useful products, nothing gathered that can be read in place.

T tokens of the step, H query heads, K KV heads, G = H / K, D head size, L pages, P page size, R rows of one token,
N pages that these rows read, C context of a chunk.

Rows of one token are batched page by page: one matrix product over all pages in use, in place when they lie close
together; then the scores, which are small, are laid side by side for the softmax; then one product with the values
(flash-decoding's split, with a page as the split). Longer chunks go through the fused kernel one by one.
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


@dataclass(slots=True)
class Rows:
    """How rows of one token read pages, for one sliding window; see `PackedStep._rows`."""

    source: slice | torch.Tensor  # pages read: a range of the store, or page ids
    owner_N: torch.Tensor
    column_N: torch.Tensor
    target_N: torch.Tensor  # the owner; R, which is thrown away, for a page nobody owns
    place_RX: torch.Tensor  # X: pages of the longest row
    bias_RS: torch.Tensor  # S = X * P: 0 where a position counts, -inf elsewhere


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
        r, x = rows.place_RX.shape
        groups = q_HRD.shape[0] // kv_heads
        q_NKGD = (q_HRD * scale).transpose(0, 1).reshape(r, kv_heads, groups, dim)[rows.owner_N]
        scores = torch.bmm(q_NKGD.flatten(0, 1), k_NKPD.flatten(0, 1).transpose(1, 2)).view(n, kv_heads, groups, size)
        scores_RKGS = scores[rows.place_RX].permute(0, 2, 3, 1, 4).reshape(r, kv_heads, groups, x * size)
        weights_RKGS = _softmax(scores_RKGS, rows.bias_RS[:, None, None], softcap, sink_H)
        weights_RXKGP = weights_RKGS.view(r, kv_heads, groups, x, size).permute(0, 3, 1, 2, 4)
        weights_NKGP = weights_RXKGP[rows.owner_N, rows.column_N]
        out_NC = torch.bmm(weights_NKGP.flatten(0, 1), v_NKPD.flatten(0, 1)).view(n, -1)
        out_RC = out_NC.new_zeros(r + 1, out_NC.shape[1]).index_add_(0, rows.target_N, out_NC)
        return out_RC[:r].view(r, kv_heads * groups, -1)

    def _rows(self, window: int | None) -> Rows:
        """Which pages each row reads, and where its positions among them begin and end."""
        size, count = self.page_size, len(self.rows)
        firsts = [max(0, length - window) // size if window else 0 for _, length in self.rows]
        lasts = [-(-length // size) for _, length in self.rows]
        per_row = np.array([last - first for first, last in zip(firsts, lasts, strict=True)])
        owner_N = np.repeat(np.arange(count), per_row)
        column_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        page_N = np.concatenate(
            [np.asarray(pages[a:b]) for (pages, _), a, b in zip(self.rows, firsts, lasts, strict=True)]
        )
        length_R1 = np.array([length for _, length in self.rows])[:, None]
        at_RS = np.array(firsts)[:, None] * size + np.arange(int(per_row.max()) * size)
        counts_RS = (at_RS < length_R1) & (at_RS >= (length_R1 - window if window else 0))
        low, high = int(page_N.min()), int(page_N.max()) + 1
        place_RX = np.zeros((count, int(per_row.max())), dtype=np.int64)
        device, dtype = self.keys[0].device, self.keys[0].dtype
        shared = len(np.unique(page_N)) < len(page_N)
        if self.one_by_one or shared or len(page_N) < DENSE * (high - low):
            source: slice | torch.Tensor = torch.from_numpy(page_N).to(device)
            place_RX[owner_N, column_N] = np.arange(len(page_N))
            target_N = owner_N
        else:
            source = slice(low, high)
            place_RX[owner_N, column_N] = page_N - low
            target_N, columns = np.full(high - low, count), np.zeros(high - low, dtype=np.int64)
            target_N[page_N - low], columns[page_N - low] = owner_N, column_N
            owner_N, column_N = target_N % count, columns
        bias_RS = torch.zeros(counts_RS.shape, dtype=dtype).masked_fill_(torch.from_numpy(~counts_RS), -torch.inf)
        owner, column, target, place = (
            torch.from_numpy(array).to(device) for array in (owner_N, column_N, target_N, place_RX)
        )
        return Rows(source, owner, column, target, place, bias_RS.to(device))


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
    bias_TC = torch.zeros_like(seen_TC, dtype=q.dtype).masked_fill_(~seen_TC, -torch.inf)
    q_KGTD = (q_HTD * scale).unflatten(0, (-1, groups))
    scores_TKGC = (q_KGTD @ k_KCD[:, None].transpose(2, 3)).permute(2, 0, 1, 3)
    weights = _softmax(scores_TKGC, bias_TC[:, None, None], softcap, sink_H).permute(1, 2, 0, 3)
    return (weights @ v_KCD[:, None]).flatten(0, 1)


def _softmax(
    scores_RKGS: torch.Tensor, bias: torch.Tensor, softcap: float | None, sink_H: torch.Tensor | None
) -> torch.Tensor:
    """Softmax over S, at least in float32; a sink takes its share of the weight and gives no value."""
    if softcap is not None:
        scores_RKGS = torch.tanh(scores_RKGS / softcap) * softcap
    scores_RKGS = scores_RKGS + bias
    wide = torch.promote_types(scores_RKGS.dtype, torch.float32)
    if sink_H is None:
        return scores_RKGS.softmax(-1, dtype=wide).to(scores_RKGS.dtype)
    r, kv_heads, groups, _ = scores_RKGS.shape
    sink = sink_H.view(1, kv_heads, groups, 1).expand(r, -1, -1, 1).to(scores_RKGS.dtype)
    return torch.cat([scores_RKGS, sink], -1).softmax(-1, dtype=wide)[..., :-1].to(scores_RKGS.dtype)
