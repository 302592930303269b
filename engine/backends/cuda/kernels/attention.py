"""The Triton kernel that attends chunks over paged keys and values, and what all attention is made of.

Nothing here knows a request or a scheduler: lengths and block tables are tensors that a kernel reads, so that
a CUDA graph that holds it never goes stale; Python numbers are shapes, or bounds of a grid whose idle
programs end at once. Block sizes are chosen by shape, ahead of time, and what differs from step to step
(counts, and where in a tensor a row begins) is never compiled in: a request must not wait for a compiler.
Every kernel also runs on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested
where there is no GPU.

T tokens of the step, R requests, H query heads, K KV heads, G = H / K, D head size, X pages, P page size, N
page ids of a block table. In kernels: M query rows and C positions of a block.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.launch import kernel, wait_for_previous

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, so softmax works in powers of two
LOWEST = tl.constexpr(-1e30)  # a running maximum before any score: finite, so that no difference is NaN


@triton.jit
def load_block(
    at, seen, keys, values, table, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys and values of positions `at` to `at + BLOCK_C`.

    What lies beyond `seen` is not loaded: it may be NaN, which a weight of zero would not hide.
    """
    c_C = at + tl.arange(0, BLOCK_C)
    d_D = tl.arange(0, BLOCK_D)
    if MASKED:
        page_C = tl.load(table + c_C // PAGE, mask=c_C < seen, other=0)
        here_CD = (c_C < seen)[:, None] & (d_D < DIM)[None, :]
    else:
        page_C = tl.load(table + c_C // PAGE)
        here_CD = tl.broadcast_to((d_D < DIM)[None, :], (BLOCK_C, BLOCK_D))
    at_CD = ((page_C.to(tl.int64) * (KV_HEADS * PAGE) + c_C % PAGE) * DIM)[:, None] + d_D[None, :]
    return tl.load(keys + at_CD, mask=here_CD, other=0.0), tl.load(values + at_CD, mask=here_CD, other=0.0)


@triton.jit
def fold_block(
    acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, at, at_M, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Fold a block of positions from `at` on into a running softmax (Milakov and Gimelshein, 2018).

    Row m sees the positions up to at_M[m], and of those the last WINDOW.
    """
    scores_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee") * scale
    if SOFTCAP:
        scores_MC = softcap * (1.0 - 2.0 / (tl.exp(2.0 / softcap * scores_MC) + 1.0))  # tanh
    scores_MC = scores_MC * LOG2E
    if MASKED:
        c_C = at + tl.arange(0, BLOCK_C)
        seen_MC = c_C[None, :] <= at_M[:, None]
        if WINDOW:
            seen_MC = seen_MC & (c_C[None, :] > at_M[:, None] - WINDOW)
        scores_MC = tl.where(seen_MC, scores_MC, float("-inf"))
    new_M = tl.maximum(peak_M, tl.max(scores_MC, 1))
    weights_MC = tl.exp2(scores_MC - new_M[:, None])
    faded_M = tl.exp2(peak_M - new_M)
    total_M = total_M * faded_M + tl.sum(weights_MC, 1)
    acc_MD = tl.dot(weights_MC.to(v_CD.dtype), v_CD, acc_MD * faded_M[:, None], input_precision="ieee")
    return acc_MD, new_M, total_M


def attend_chunks(
    q_THD: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    tables_RN: torch.Tensor,
    begins_R: torch.Tensor,
    ends_R: torch.Tensor,
    computed_R: torch.Tensor,
    tiles_W2: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of chunks of several requests over their pages (FlashAttention; Dao et al., 2022).

    The query heads that share a KV head are rows of one matrix product, so keys and values are read once for
    all.

    Args:
        q_THD: queries; their keys and values are in the pages already. Strided as you like.
        tables_RN: each request's pages, int32.
        begins_R, ends_R: where in the step each request's tokens lie, int32. computed_R: how many precede
            them, int32.
        tiles_W2: the work, int32: (request, first of its tokens in the step) for every `chunk_tokens` tokens
            of it; a request of -1 is no work. Longest first keeps the GPU busy to the end.
        out_THD: where to write, contiguous; rows of no tile stay as they are. Made if None.

    Returns:
        out_THD.
    """
    kv_heads, page, dim = keys_XKPD.shape[1:]
    groups = q_THD.shape[1] // kv_heads
    out_THD = q_THD.new_empty(q_THD.shape) if out_THD is None else out_THD
    rows, block, warps, stages = _chunk_blocks(groups, dim, q_THD.element_size())
    _chunks[tiles_W2.shape[0], kv_heads](
        q_THD, out_THD, keys_XKPD, values_XKPD, tables_RN, begins_R, ends_R, computed_R, tiles_W2,
        scale, softcap or 0.0, *q_THD.stride()[:2], tables_RN.stride(0),
        KV_HEADS=kv_heads, GROUPS=groups, DIM=dim, PAGE=page, WINDOW=window or 0, SOFTCAP=softcap is not None,
        TOKENS=rows // groups, BLOCK_M=rows, BLOCK_C=block,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out_THD


def chunk_tokens(groups: int, dim: int, element_bytes: int) -> int:
    """Tokens of one tile of `attend_chunks`."""
    return _chunk_blocks(groups, dim, element_bytes)[0] // groups


def _chunk_blocks(groups: int, dim: int, element_bytes: int) -> tuple[int, int, int, int]:
    """Query rows, positions, warps and pipeline stages that spill no register and fit 227 KiB of shared
    memory.

    float32 is exact here, so it has no matrix instructions and its operands lie in registers: small blocks.
    """
    rows, block, warps, stages = (128, 64, 8, 3) if dim <= 128 else (64, 32, 8, 2)
    if element_bytes > 2:
        rows, block, stages = 16, 32 if dim <= 128 else 16, 2
    return max(rows, triton.next_power_of_2(groups)), block, warps, stages


# rows of a tensor: any number lies before
@kernel(do_not_specialize_on_alignment=["begins", "ends", "computed"])
def _chunks(
    q, out, keys, values, tables, begins, ends, computed, tiles, scale, softcap, q_token, q_head,
    table_row, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one request and the query heads of one KV head."""
    wait_for_previous(PDL)
    request, first = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    if request < 0:
        return
    kv_head = tl.program_id(1)
    begin, end = tl.load(begins + request), tl.load(ends + request)
    m_M = tl.arange(0, BLOCK_M)
    t_M = (first + m_M // GROUPS).to(tl.int64)
    head_M = kv_head * GROUPS + m_M % GROUPS
    d_D = tl.arange(0, BLOCK_D)
    here_M = (m_M < TOKENS * GROUPS) & (t_M < end)
    here_MD = here_M[:, None] & (d_D < DIM)[None, :]
    q_MD = tl.load(q + (t_M * q_token + head_M * q_head)[:, None] + d_D[None, :], mask=here_MD, other=0.0)
    past = tl.load(computed + request)
    low = past + first - begin  # the position of the tile's first token
    high = tl.minimum(low + TOKENS, past + end - begin)  # one beyond its last
    at_M = low + m_M // GROUPS
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak_M = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    offset = kv_head * (PAGE * DIM)
    table = tables + request.to(tl.int64) * table_row
    # Positions before `clear` are seen by every row of the tile and need no mask; a window hides some from
    # any block.
    start, clear = 0, (low + 1) // BLOCK_C * BLOCK_C
    if WINDOW:
        start = tl.maximum(low - WINDOW + 1, 0) // BLOCK_C * BLOCK_C
        clear = start
    for at in range(start, clear, BLOCK_C):
        k_CD, v_CD = load_block(
            at, high, keys + offset, values + offset, table, KV_HEADS, DIM, PAGE, False, BLOCK_C, BLOCK_D
        )
        acc_MD, peak_M, total_M = fold_block(
            acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, at, at_M, scale, softcap, WINDOW, SOFTCAP, False,
            BLOCK_C,
        )  # fmt: skip
    for at in range(clear, high, BLOCK_C):
        k_CD, v_CD = load_block(
            at, high, keys + offset, values + offset, table, KV_HEADS, DIM, PAGE, True, BLOCK_C, BLOCK_D
        )
        acc_MD, peak_M, total_M = fold_block(
            acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, at, at_M, scale, softcap, WINDOW, SOFTCAP, True,
            BLOCK_C,
        )  # fmt: skip
    out_MD = acc_MD / total_M[:, None]
    at_MD = (t_M * (KV_HEADS * GROUPS) + head_M)[:, None] * DIM + d_D[None, :]
    tl.store(out + at_MD, out_MD.to(out.dtype.element_ty), mask=here_MD)
