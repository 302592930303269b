"""The Triton kernel that attends rows of one token over paged keys and values: one launch a layer.

Each context is cut into splits that run side by side; the split that ends last puts a row's partial results
together, always in their order. A row that is its request's newest token is rotated on the way, and its key
and value are written into their page; what of its context earlier steps have written is on its way before the
kernel before has ended. engine/backends/cuda/kernels/attention.py says how kernels are written here.

B rows, H query heads, K KV heads, G = H / K, D head size, E half of it, X pages, P page size, N page ids of a
block table, S splits of a row, L positions of a model. In kernels: M query rows and C positions of a block.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.attention import LOWEST, fold_block, load_block
from engine.backends.cuda.kernels.launch import kernel, launch_dependents, prefetch_l2, wait_for_previous
from engine.backends.cuda.kernels.rope_kv_write import load_head, rotated

MAX_SPLITS = 128  # with two KV heads this fills 132 multiprocessors at batch 1
COMBINED = 2**13  # elements of partial results that are put together at a time
SHORT_SPLIT, LONG_SPLIT = 64, 1024  # positions of a row's context that a program attends to
FEW_PROGRAMS = 64  # of one split: up to so many, the shortest are needed to fill a GPU


class NewTokens(NamedTuple):
    """Rows whose keys and values are in no page yet, and which are not rotated.

    Args:
        k, v: [B, K, D], any strides between rows and heads. Or these and the queries are
            [S, B, H or K, D], partial sums of a product of all three side by side (`split_k_product`).
        positions_B: lines of angles_LD, which has E cosines and then E sines.
        bias_N: what partial sums still lack, for queries, keys and values.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions_B: torch.Tensor
    angles_LD: torch.Tensor
    bias_N: torch.Tensor | None = None


def split_size(rows: int, kv_heads: int) -> int:
    """Return the positions of a split for so many rows: few are cut finely, or they fill no GPU; of many,
    splits leave work to put together."""
    return min(LONG_SPLIT, SHORT_SPLIT * triton.next_power_of_2(triton.cdiv(rows * kv_heads, FEW_PROGRAMS)))


def attend_rows(
    q: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    tables_RN: torch.Tensor,
    lengths_B: torch.Tensor,
    max_length: int,
    arrived_A: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    owners_B: torch.Tensor | None = None,
    split: int = SHORT_SPLIT,
    new: NewTokens | None = None,
    out_BHD: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows of one token, each context cut into splits (Flash-Decoding; Dao, 2023).

    How a row is cut is a function of its own length, its window and `split` alone, and its splits are put
    together in a fixed order: a row's bits depend neither on the other rows nor on how many there are, nor on
    max_length.

    Args:
        q: queries [B, H, D], strided as you like; or as `new` has them.
        tables_RN: block tables, int32; row b reads line owners_B[b] (int32), or line b without owners.
        lengths_B: positions that each row sees, itself included, int32; 0 gives zeros.
        max_length: no length is larger. It bounds the grid and nothing else.
        arrived_A: int32, A >= B * K; 0 before every launch and after it, and of one launch at a time.
        split: positions of a split, at least; more where there would be more than MAX_SPLITS.
        new: of rows whose newest position is in no page; then no two rows have the same page to write to, and
            what else they see was written by kernels of earlier steps.
        out_BHD: where to write, contiguous. Made if None.
        ahead: a weight that is read soon after (`prefetch_l2`).

    Returns:
        out_BHD.
    """
    rows, heads, dim = q.shape[-3:]
    kv_heads, page = keys_XKPD.shape[1:3]
    groups, block_d = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    block, warps, stages = _row_blocks(dim, keys_XKPD.element_size())
    split = triton.cdiv(split, block) * block
    seen = min(max_length, window + block) if window else max_length
    splits = max(1, min(MAX_SPLITS, triton.cdiv(seen, split)))
    parts_BHSD = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    peaks_BHS = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    out_BHD = keys_XKPD.new_empty(rows, heads, dim) if out_BHD is None else out_BHD
    k, v, positions, angles, bias_N = new or NewTokens(q, q, lengths_B, q)
    block_g = triton.next_power_of_2(groups)
    _rows[rows, kv_heads, splits](
        q, k, v, q if bias_N is None else bias_N, positions, angles, keys_XKPD, values_XKPD, tables_RN,
        lengths_B, lengths_B if owners_B is None else owners_B, parts_BHSD, peaks_BHS, arrived_A,
        out_BHD, q if ahead is None else ahead, scale, softcap or 0.0, q.stride(0) if q.dim() == 4 else 0,
        *q.stride()[-3:-1], *k.stride()[-3:-1], *v.stride()[-3:-1], tables_RN.stride(0), splits, split,
        NEW=new is not None, PARTS=len(q) if q.dim() == 4 else 0, BIAS=bias_N is not None,
        OWNERS=owners_B is not None, KV_HEADS=kv_heads, GROUPS=groups, DIM=dim, PAGE=page,
        WINDOW=window or 0, SOFTCAP=softcap is not None, MAX_SPLITS=MAX_SPLITS,
        AHEAD=0 if ahead is None else ahead.nbytes, BLOCK_M=max(16, block_g), BLOCK_G=block_g,
        BLOCK_S=max(1, min(16, COMBINED // (block_g * block_d))), BLOCK_C=block, BLOCK_D=block_d,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out_BHD


def _row_blocks(dim: int, element_bytes: int) -> tuple[int, int, int]:
    """Positions, warps and pipeline stages that spill no register, but for float32 with heads beyond 128."""
    if element_bytes == 2:
        return (64, 4, 3) if dim <= 128 else (32, 4, 2)
    return (32, 8, 2) if dim <= 128 else (16, 8, 2)


@triton.jit
def _span(length, least, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Where a row's first split begins, and how many positions each has: what alone decides how a row is
    cut."""
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0) // BLOCK_C * BLOCK_C
    return first, tl.maximum(least, tl.cdiv(length - first, MAX_SPLITS * BLOCK_C) * BLOCK_C)


@kernel(
    do_not_specialize=["part", "splits", "least"],
    do_not_specialize_on_alignment=["lengths", "owners", "positions"],
)
def _rows(
    q, k, v, bias, positions, angles, keys, values, tables, lengths, owners, parts, peaks, arrived, out,
    ahead, scale, softcap, part, q_row, q_head, k_row, k_head, v_row, v_head, table_row, splits, least,
    NEW: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, OWNERS: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MAX_SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one row and the query heads of one KV head."""
    launch_dependents(PDL)
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    owner = row
    if OWNERS:
        owner = tl.load(owners + row).to(tl.int64)
    first, span = _span(length, least, WINDOW, BLOCK_C, MAX_SPLITS)
    begin = first + split * span
    end = tl.minimum(begin + span, length)
    past = length - NEW  # positions that are in pages
    table, offset = tables + owner * table_row, kv_head * (PAGE * DIM)
    if not NEW:
        wait_for_previous(PDL)
    k_CD, v_CD = load_block(
        begin, past, keys + offset, values + offset, table, KV_HEADS, DIM, PAGE, True, BLOCK_C, BLOCK_D
    )
    d_D = tl.arange(0, BLOCK_D)
    half: tl.constexpr = DIM // 2
    angle_1D = tl.where(d_D < half, d_D, d_D - half)[None, :]
    if NEW:
        at = angles + tl.load(positions + row).to(tl.int64) * DIM
        cos_1D = tl.load(at + angle_1D, mask=d_D[None, :] < DIM, other=1.0).to(tl.float32)
        sin_1D = tl.load(at + half + angle_1D, mask=d_D[None, :] < DIM, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    if AHEAD:
        program = (split * tl.num_programs(0) + tl.program_id(0)) * KV_HEADS + kv_head
        prefetch_l2(ahead, AHEAD, program, tl.num_programs(0) * KV_HEADS * tl.num_programs(2), 128, PDL)
    if begin >= length:
        if split == 0:  # a row of nobody
            g_G = tl.arange(0, BLOCK_G)
            at_GD = ((row * KV_HEADS + kv_head) * GROUPS + g_G)[:, None] * DIM + d_D[None, :]
            here_GD = (g_G < GROUPS)[:, None] & (d_D < DIM)[None, :]
            tl.store(out + at_GD, tl.zeros((BLOCK_G, BLOCK_D), out.dtype.element_ty), mask=here_GD)
        return
    m_M = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUPS + m_M
    here_MD = (m_M < GROUPS)[:, None] & (d_D < DIM)[None, :]
    at_M1 = (q + row * q_row + head_M * q_head)[:, None]
    new_k_1D = tl.zeros((1, BLOCK_D), keys.dtype.element_ty)
    new_v_1D = tl.zeros((1, BLOCK_D), values.dtype.element_ty)
    if NEW:
        here_1D = d_D[None, :] < DIM
        bias_M1, one_11 = bias + head_M[:, None] * DIM, tl.zeros((1, 1), tl.int64)
        x_MD, y_MD = _whole(at_M1, bias_M1, part, d_D, here_MD, DIM, PARTS, BIAS, keys.dtype.element_ty)
        q_MD = rotated(x_MD, y_MD, cos_1D, sin_1D, d_D, DIM).to(keys.dtype.element_ty)
        at_11 = k + one_11 + row * k_row + kv_head * k_head
        bias_11 = bias + one_11 + (KV_HEADS * GROUPS + kv_head) * DIM
        x_1D, y_1D = _whole(at_11, bias_11, part, d_D, here_1D, DIM, PARTS, BIAS, keys.dtype.element_ty)
        new_k_1D = rotated(x_1D, y_1D, cos_1D, sin_1D, d_D, DIM).to(keys.dtype.element_ty)
        at_11 = v + one_11 + row * v_row + kv_head * v_head
        bias_11 += KV_HEADS * DIM
        x_1D, y_1D = _whole(at_11, bias_11, part, d_D, here_1D, DIM, PARTS, BIAS, values.dtype.element_ty)
        new_v_1D = x_1D.to(values.dtype.element_ty)
        if end == length:
            page = tl.load(table + past // PAGE).to(tl.int64)
            at_1D = ((page * KV_HEADS + kv_head) * PAGE + past % PAGE) * DIM + d_D[None, :]
            tl.store(keys + at_1D, new_k_1D, mask=here_1D)
            tl.store(values + at_1D, new_v_1D, mask=here_1D)
    else:
        q_MD = tl.load(at_M1 + d_D[None, :], mask=here_MD, other=0.0)
    at_M = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak_M = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MD, peak_M, total_M = _fold_with_new(
        acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, new_k_1D, new_v_1D, begin, length, at_M, scale, softcap,
        NEW, WINDOW, SOFTCAP, BLOCK_C,
    )  # fmt: skip
    for at in range(begin + BLOCK_C, end, BLOCK_C):
        k_CD, v_CD = load_block(
            at, past, keys + offset, values + offset, table, KV_HEADS, DIM, PAGE, True, BLOCK_C, BLOCK_D
        )
        acc_MD, peak_M, total_M = _fold_with_new(
            acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, new_k_1D, new_v_1D, at, length, at_M, scale, softcap,
            NEW, WINDOW, SOFTCAP, BLOCK_C,
        )  # fmt: skip
    out_MD = acc_MD / total_M[:, None]
    used = tl.cdiv(length - first, span)
    row_head = row * KV_HEADS + kv_head
    if used == 1:
        at_MD = (row_head * GROUPS + m_M)[:, None] * DIM + d_D[None, :]
        tl.store(out + at_MD, out_MD.to(out.dtype.element_ty), mask=here_MD)
    else:
        at_part_M = (row_head * GROUPS + m_M) * splits + split
        tl.store(parts + at_part_M[:, None] * DIM + d_D[None, :], out_MD, mask=here_MD)
        tl.store(peaks + at_part_M, peak_M + tl.log2(total_M), mask=m_M < GROUPS)
        tl.debug_barrier()  # all of it is written before the program is counted
        if tl.atomic_add(arrived + row_head, 1, sem="acq_rel") == used - 1:
            tl.store(arrived + row_head, 0)
            _combine(
                parts, peaks, out, row_head * GROUPS, splits, used, GROUPS, DIM, BLOCK_G, BLOCK_S, BLOCK_D
            )


@triton.jit
def _whole(
    row_T1, bias_T1, part, d_D, here_TD, DIM: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """As `load_head`; of partial sums, what they and the bias come to, rounded as a product's output."""
    x_TD, y_TD = load_head(row_T1, d_D, here_TD, DIM)
    for s in tl.static_range(1, PARTS):
        more_TD, other_TD = load_head(row_T1 + s * part, d_D, here_TD, DIM)
        x_TD, y_TD = x_TD + more_TD, y_TD + other_TD
    if BIAS:
        more_TD, other_TD = load_head(bias_T1, d_D, here_TD, DIM)
        x_TD, y_TD = x_TD + more_TD, y_TD + other_TD
    return x_TD.to(KIND).to(tl.float32), y_TD.to(KIND).to(tl.float32)


@triton.jit
def _fold_with_new(
    acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, new_k_1D, new_v_1D, at, length, at_M, scale, softcap,
    NEW: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `fold_block`, of a block in which the newest position is not loaded, if NEW."""
    if NEW:
        newest_C1 = (at + tl.arange(0, BLOCK_C) == length - 1)[:, None]
        k_CD, v_CD = tl.where(newest_C1, new_k_1D, k_CD), tl.where(newest_C1, new_v_1D, v_CD)
    return fold_block(
        acc_MD, peak_M, total_M, q_MD, k_CD, v_CD, at, at_M, scale, softcap, WINDOW, SOFTCAP, True, BLOCK_C
    )


@triton.jit
def _combine(
    parts, peaks, out, head, splits, used, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put together the splits of GROUPS heads from `head` on, BLOCK_S at a time, always from the first.

    They are read past the L1 cache, which does not know what other multiprocessors have written.
    """
    g_G, d_D = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    peak_G, total_G = tl.full((BLOCK_G,), LOWEST, tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    acc_GD = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for at in range(0, used, BLOCK_S):
        s_S = at + tl.arange(0, BLOCK_S)
        at_SG = (head + g_G)[None, :] * splits + s_S[:, None]
        here_SG = (s_S < used)[:, None] & (g_G < GROUPS)[None, :]
        peak_SG = tl.load(peaks + at_SG, mask=here_SG, other=float("-inf"), cache_modifier=".cg")
        at_SGD = at_SG[:, :, None] * DIM + d_D[None, None, :]
        here_SGD = here_SG[:, :, None] & (d_D < DIM)[None, None, :]
        part_SGD = tl.load(parts + at_SGD, mask=here_SGD, other=0.0, cache_modifier=".cg")
        new_G = tl.maximum(peak_G, tl.max(peak_SG, 0))
        weight_SG = tl.exp2(peak_SG - new_G[None, :])
        faded_G = tl.exp2(peak_G - new_G)
        total_G = total_G * faded_G + tl.sum(weight_SG, 0)
        acc_GD = acc_GD * faded_G[:, None] + tl.sum(weight_SG[:, :, None] * part_SGD, 0)
        peak_G = new_G
    at_GD = (head + g_G)[:, None] * DIM + d_D[None, :]
    here_GD = (g_G < GROUPS)[:, None] & (d_D < DIM)[None, :]
    total_G = tl.where(total_G == 0.0, 1.0, total_G)  # of heads beyond GROUPS
    tl.store(out + at_GD, (acc_GD / total_G[:, None]).to(out.dtype.element_ty), mask=here_GD)
