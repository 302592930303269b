"""Attention of rows of one token over pages, as one function of tensors.

R rows, N pages that they read, H query heads, K KV heads, G = H / K, D head size, L pages, P page size, X
pages of the row that has the most, B blocks of E dimensions of a value. Every page gives its own softmax, and
a row puts those of its pages and its own token together (flash-decoding; Dao et al., 2023, with a page as the
split), so only useful products are computed and nothing is padded but the last page. What a product adds up
lies side by side, a vector at a time: keys dimension by dimension, and of values a block of every position
before the next block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of one token read pages, for one sliding window."""

    page_N: torch.Tensor  # the pages read
    owner_N: torch.Tensor  # the row that each belongs to
    bias_NP: torch.Tensor  # 0 where a position counts for its row, -inf elsewhere
    place_XR: torch.Tensor  # each row's pages among the N, one below the other; -1 after its last


def rows_of(
    tables: list[tuple[list[int], int]],
    size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Rows:
    """Which pages each row reads, and which of their positions count for it: those before its own, in the
    window.

    `tables` has a row's pages and its own position. A row without a past reads one page, of which nothing
    counts.
    """
    past_R = np.array([position for _, position in tables], dtype=np.int64)
    first_R = np.maximum(0, past_R + 1 - window) // size if window else np.zeros_like(past_R)
    pages_R = np.maximum(1, -(-past_R // size) - first_R)
    owner_N = np.repeat(np.arange(len(tables)), pages_R)
    column_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(pages_R) - pages_R, pages_R)
    spans = zip(tables, first_R, first_R + pages_R, strict=True)
    page_N = np.concatenate([np.empty(0, np.int64), *(np.asarray(pages[a:b]) for (pages, _), a, b in spans)])
    at_NP = ((first_R[owner_N] + column_N) * size)[:, None] + np.arange(size)
    past_N1 = past_R[owner_N][:, None]
    hidden_NP = (at_NP >= past_N1) | (at_NP <= (past_N1 - window if window else -1))
    place_XR = np.full((int(pages_R.max(initial=1)), len(tables)), -1, dtype=np.int64)
    place_XR[column_N, owner_N] = np.arange(len(owner_N))
    bias_NP = torch.zeros(hidden_NP.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden_NP), -torch.inf)
    page, owner, place = (torch.from_numpy(array).to(device) for array in (page_N, owner_N, place_XR))
    return Rows(page, owner, bias_NP.to(device), place)


def by_sum(x_RX: torch.Tensor) -> torch.Tensor:
    """Sum over a row's pages."""
    return x_RX.sum(1)


def in_order(x_RX: torch.Tensor) -> torch.Tensor:
    """Sum over a row's pages strictly in their order, so that the bits do not depend on how many columns
    there are."""
    return x_RX.cumsum(1)[:, -1]


def attend_rows(
    q_RHD: torch.Tensor,
    k_RKD: torch.Tensor,
    v_RKD: torch.Tensor,
    keys_LKDP: torch.Tensor,
    values_LKBPE: torch.Tensor,
    page_R: torch.Tensor,
    offset_R: torch.Tensor,
    page_N: torch.Tensor,
    owner_N: torch.Tensor,
    bias_NP: torch.Tensor,
    place_XR: torch.Tensor,
    *,
    softcap: float | None = None,
    sink_H: torch.Tensor | None = None,
    add_up: Callable[[torch.Tensor], torch.Tensor] = by_sum,
) -> torch.Tensor:
    """Write the rows' keys and values into their pages and attend with their scaled queries; gives [R, H, D].

    Args:
        keys_LKDP, values_LKBPE: the store of a layer, written to.
        page_R, offset_R: where each row's own key and value belong.
        page_N, owner_N, bias_NP, place_XR: as in Rows.
        softcap: squashes scores to within +-softcap (Gemma 2).
        sink_H: a score that takes its share of each head's weight and gives no value (gpt-oss).
        add_up: sum over the second dimension, a row's pages.
    """
    kv_heads, wide = keys_LKDP.shape[1], bias_NP.dtype
    q_RKGD = q_RHD.unflatten(1, (kv_heads, -1))
    v_RKBE = v_RKD.unflatten(2, (values_LKBPE.shape[2], -1))
    keys_LKDP[page_R, :, :, offset_R] = k_RKD  # first: rows of one request see those before them
    values_LKBPE[page_R, :, :, offset_R] = v_RKBE

    def capped(scores: torch.Tensor) -> torch.Tensor:
        return scores.to(wide) if softcap is None else torch.tanh(scores.to(wide) / softcap) * softcap

    own_RKG = capped((q_RKGD.to(wide) * k_RKD[:, :, None].to(wide)).sum(-1))
    scores_NKGP = capped(_multiply(q_RKGD[owner_N], keys_LKDP[page_N][:, :, None])[:, :, :, 0])
    scores_NKGP = scores_NKGP + bias_NP[:, None, None]
    # not -inf, where nothing of a page counts
    peak_NKG = scores_NKGP.amax(-1).clamp_min(torch.finfo(wide).min)
    weights_NKGP = (scores_NKGP - peak_NKG[..., None]).exp()
    total_NKG = weights_NKGP.sum(-1)
    mixed_NKGBE = _multiply(weights_NKGP.to(values_LKBPE.dtype), values_LKBPE[page_N]).to(wide)
    place_RX = place_XR.t()
    absent_RX11 = (place_RX < 0)[..., None, None]
    place_RX = place_RX.where(place_RX >= 0, place_RX[:, :1])  # its own: no weight hides a neighbour's NaN
    peak_RXKG = peak_NKG[place_RX].masked_fill(absent_RX11, -torch.inf)
    peak_RKG = torch.maximum(own_RKG, peak_RXKG.amax(1))
    if sink_H is not None:
        sink_KG = sink_H.to(wide).unflatten(0, (kv_heads, -1))
        peak_RKG = torch.maximum(peak_RKG, sink_KG)
    share_RXKG, own_RKG = (peak_RXKG - peak_RKG[:, None]).exp(), (own_RKG - peak_RKG).exp()
    total_RKG = own_RKG + add_up(share_RXKG * total_NKG[place_RX])
    if sink_H is not None:
        total_RKG = total_RKG + (sink_KG - peak_RKG).exp()
    mixed_RKGBE = own_RKG[..., None, None] * v_RKBE[:, :, None]
    mixed_RKGBE = mixed_RKGBE + add_up(share_RXKG[..., None, None] * mixed_NKGBE[place_RX])
    out_RKGBE = (mixed_RKGBE / total_RKG[..., None, None]).to(q_RHD.dtype)
    return out_RKGBE.flatten(3).flatten(1, 2)


def _multiply(a_NKGX: torch.Tensor, b_NKBXY: torch.Tensor) -> torch.Tensor:
    """Each head of a group by each of its B matrices, [N, K, G, B, Y]."""
    return (a_NKGX[:, :, None] @ b_NKBXY).transpose(2, 3)
