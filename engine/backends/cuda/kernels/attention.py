"""Triton kernels over paged keys and values: attend chunks, attend rows of one token.

Nothing here knows a request or a scheduler: lengths and block tables are tensors that a kernel reads, so that
a CUDA graph that holds it never goes stale; Python numbers are shapes, or bounds of a grid whose idle
programs end at once. Block sizes are chosen by shape, ahead of time, and what differs from step to step
(counts, and where in a tensor a row begins) is never compiled in: a request must not wait for a compiler.
Every kernel also runs on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested
where there is no GPU.

T tokens of the step, R requests, B rows of one token, H query heads, K KV heads, G = H / K, D head size, X
pages, P page size, N page ids of a block table, S splits of a row. In kernels: M query rows and C positions
of a block.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.pdl import DEPENDENT, launch_dependents, wait_for_previous

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, so softmax works in powers of two
LOWEST = tl.constexpr(-1e30)  # a running maximum before any score: finite, so that no difference is NaN
MAX_SPLITS = 128  # with two KV heads this fills 132 multiprocessors at batch 1
COMBINED = tl.constexpr(16)  # splits that are put together at a time


@triton.jit
def _fold(
    acc_MD, peak_M, total_M, q_MD, at, length, at_M, keys, values, table, scale, softcap,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold positions `at` to `at + BLOCK_C` into a running softmax (Milakov and Gimelshein, 2018).

    What lies beyond `length` is not loaded: it may be NaN, which a weight of zero would not hide.
    """
    c_C = at + tl.arange(0, BLOCK_C)
    d_D = tl.arange(0, BLOCK_D)
    if MASKED:
        page_C = tl.load(table + c_C // PAGE, mask=c_C < length, other=0)
        here_CD = (c_C < length)[:, None] & (d_D < DIM)[None, :]
    else:
        page_C = tl.load(table + c_C // PAGE)
        here_CD = tl.broadcast_to((d_D < DIM)[None, :], (BLOCK_C, BLOCK_D))
    at_CD = ((page_C.to(tl.int64) * (KV_HEADS * PAGE) + c_C % PAGE) * DIM)[:, None] + d_D[None, :]
    k_CD = tl.load(keys + at_CD, mask=here_CD, other=0.0)
    v_CD = tl.load(values + at_CD, mask=here_CD, other=0.0)  # on its way while the keys are used
    scores_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee") * scale
    if SOFTCAP:
        scores_MC = softcap * (1.0 - 2.0 / (tl.exp(2.0 / softcap * scores_MC) + 1.0))  # tanh
    scores_MC = scores_MC * LOG2E
    if MASKED:
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
        BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=warps, num_stages=stages, **DEPENDENT,
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
@triton.jit(do_not_specialize_on_alignment=["begins", "ends", "computed"])
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
        acc_MD, peak_M, total_M = _fold(
            acc_MD, peak_M, total_M, q_MD, at, high, at_M, keys + offset, values + offset, table, scale,
            softcap, KV_HEADS, DIM, PAGE, WINDOW, SOFTCAP, False, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    for at in range(clear, high, BLOCK_C):
        acc_MD, peak_M, total_M = _fold(
            acc_MD, peak_M, total_M, q_MD, at, high, at_M, keys + offset, values + offset, table, scale,
            softcap, KV_HEADS, DIM, PAGE, WINDOW, SOFTCAP, True, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    out_MD = acc_MD / total_M[:, None]
    at_MD = (t_M * (KV_HEADS * GROUPS) + head_M)[:, None] * DIM + d_D[None, :]
    tl.store(out + at_MD, out_MD.to(out.dtype.element_ty), mask=here_MD)


def attend_rows(
    q_BHD: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    tables_RN: torch.Tensor,
    lengths_B: torch.Tensor,
    max_length: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    owners_B: torch.Tensor | None = None,
    split: int = 64,
    out_BHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows of one token, each context cut into splits that run side by side (Flash-Decoding;
    Dao, 2023).

    How a row is cut is a function of its own length, its window and `split` alone, and its splits are put
    together in a fixed order: a row's bits depend neither on the other rows nor on how many there are, nor on
    max_length.

    Args:
        q_BHD: queries; strided as you like.
        tables_RN: block tables, int32; row b reads line owners_B[b] (int32), or line b without owners.
        lengths_B: positions that each row sees, itself included, int32; 0 gives zeros.
        max_length: no length is larger. It bounds the grid and nothing else.
        split: positions of a split, at least; more where there would be more than MAX_SPLITS. Small ones fill
            the GPU when there are few rows, large ones leave less to put together when there are many.
        out_BHD: where to write, contiguous. Made if None.

    Returns:
        out_BHD.
    """
    rows, heads, dim = q_BHD.shape
    kv_heads, page = keys_XKPD.shape[1:3]
    half = q_BHD.element_size() == 2
    block, stages = (64, 3) if dim <= 128 and half else (32, 2) if dim <= 128 or half else (16, 2)
    split = triton.cdiv(split, block) * block
    seen = min(max_length, window + block) if window else max_length
    splits = max(1, min(MAX_SPLITS, triton.cdiv(seen, split)))
    parts_BHSD = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q_BHD.device)
    peaks_BHS = torch.empty(rows, heads, splits, dtype=torch.float32, device=q_BHD.device)
    out_BHD = q_BHD.new_empty(q_BHD.shape) if out_BHD is None else out_BHD
    shape = dict(
        DIM=dim, WINDOW=window or 0, BLOCK_C=block, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        MAX_SPLITS=MAX_SPLITS, **DEPENDENT,
    )  # fmt: skip
    _rows[rows, kv_heads, splits](
        q_BHD, keys_XKPD, values_XKPD, tables_RN, lengths_B, lengths_B if owners_B is None else owners_B,
        parts_BHSD, peaks_BHS, scale, softcap or 0.0, *q_BHD.stride()[:2], tables_RN.stride(0), splits, split,
        OWNERS=owners_B is not None, KV_HEADS=kv_heads, GROUPS=heads // kv_heads, PAGE=page,
        SOFTCAP=softcap is not None, BLOCK_M=max(16, triton.next_power_of_2(heads // kv_heads)), **shape,
        num_warps=4 if half else 8, num_stages=stages,
    )  # fmt: skip
    _combine[rows, heads](
        parts_BHSD, peaks_BHS, lengths_B, out_BHD, splits, split, HEADS=heads, **shape, num_warps=2,
    )  # fmt: skip
    return out_BHD


@triton.jit
def _span(length, least, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Where a row's first split begins, and how many positions each has: what alone decides how a row is
    cut."""
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0) // BLOCK_C * BLOCK_C
    return first, tl.maximum(least, tl.cdiv(length - first, MAX_SPLITS * BLOCK_C) * BLOCK_C)


@triton.jit(do_not_specialize=["splits", "least"], do_not_specialize_on_alignment=["lengths", "owners"])
def _rows(
    q, keys, values, tables, lengths, owners, parts, peaks, scale, softcap, q_row, q_head, table_row, splits,
    least, OWNERS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one row and the query heads of one KV head: a partial result and the log of its weight."""
    launch_dependents(PDL)
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    owner = row
    if OWNERS:
        owner = tl.load(owners + row).to(tl.int64)
    first, span = _span(length, least, WINDOW, BLOCK_C, MAX_SPLITS)
    begin = first + split * span
    wait_for_previous(PDL)
    if begin >= length:
        return
    m_M = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUPS + m_M
    d_D = tl.arange(0, BLOCK_D)
    here_MD = (m_M < GROUPS)[:, None] & (d_D < DIM)[None, :]
    q_MD = tl.load(q + (row * q_row + head_M * q_head)[:, None] + d_D[None, :], mask=here_MD, other=0.0)
    at_M = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak_M = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    offset = kv_head * (PAGE * DIM)
    for at in range(begin, tl.minimum(begin + span, length), BLOCK_C):
        acc_MD, peak_M, total_M = _fold(
            acc_MD, peak_M, total_M, q_MD, at, length, at_M, keys + offset, values + offset,
            tables + owner * table_row, scale, softcap,
            KV_HEADS, DIM, PAGE, WINDOW, SOFTCAP, True, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    at_part_M = (row * (KV_HEADS * GROUPS) + head_M) * splits + split
    tl.store(parts + at_part_M[:, None] * DIM + d_D[None, :], acc_MD / total_M[:, None], mask=here_MD)
    tl.store(peaks + at_part_M, peak_M + tl.log2(total_M), mask=m_M < GROUPS)


@triton.jit(do_not_specialize=["splits", "least"], do_not_specialize_on_alignment=["lengths"])
def _combine(
    parts, peaks, lengths, out, splits, least, HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    MAX_SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Put together the splits of one row and head, COMBINED at a time, always from the first."""
    launch_dependents(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    first, span = _span(length, least, WINDOW, BLOCK_C, MAX_SPLITS)
    used = tl.cdiv(length - first, span)
    wait_for_previous(PDL)
    d_D = tl.arange(0, BLOCK_D)
    at_row = (row * HEADS + head) * splits
    peak, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    acc_D = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(0, used, COMBINED):
        s_S = at + tl.arange(0, COMBINED)
        peak_S = tl.load(peaks + at_row + s_S, mask=s_S < used, other=float("-inf"))
        here_SD = (s_S < used)[:, None] & (d_D < DIM)[None, :]
        part_SD = tl.load(parts + (at_row + s_S)[:, None] * DIM + d_D[None, :], mask=here_SD, other=0.0)
        new = tl.maximum(peak, tl.max(peak_S, 0))
        weight_S = tl.exp2(peak_S - new)
        faded = tl.exp2(peak - new)
        total = total * faded + tl.sum(weight_S, 0)
        acc_D = acc_D * faded + tl.sum(weight_S[:, None] * part_SD, 0)
        peak = new
    out_D = acc_D / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * HEADS + head) * DIM + d_D, out_D.to(out.dtype.element_ty), mask=d_D < DIM)
