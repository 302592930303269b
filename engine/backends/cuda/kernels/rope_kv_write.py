"""The Triton kernel that writes keys and values into their pages, and rotates queries and keys on the way.

engine/backends/cuda/kernels/attention.py says how kernels are written here.

T tokens of the step, H query heads, K KV heads, D head size, E rotated part of it, L pages, P page size, S
parts of a sum, N outputs of a product.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.pdl import DEPENDENT, launch_dependents, wait_for_previous


def write_pages(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    slots_T: torch.Tensor,
    keys_LKPD: torch.Tensor,
    values_LKPD: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Write the step's keys and values into their pages, in one launch with the rotation of queries and keys.

    Args:
        k_TKD, v_TKD: any strides between tokens and heads (views of a joined product will do). Or [S, T, K,
            D], as queries are then: partial sums of a product of queries, keys and values side by side
            (`split_k_product`).
        slots_T: where each token goes: page * P + place in the page. A negative slot is written nowhere.
        rope: (q_THD, cos_TE, sin_TE) to rotate the first E of D elements of queries and keys as Llama does
            (RoPE; Su et al., 2021), in float32; None where the model has done so.
        bias_N: what partial sums still lack, for queries, keys and values.

    Returns:
        The rotated queries [T, H, D], contiguous; None without `rope`.
    """
    parts, stride = (k_TKD.shape[0], k_TKD.stride(0)) if k_TKD.dim() == 4 else (0, 0)
    tokens, kv_heads, dim = k_TKD.shape[-3:]
    q_THD, cos_TE, sin_TE = (k_TKD, k_TKD, k_TKD) if rope is None else rope
    heads, rotated = (0, 0) if rope is None else (q_THD.shape[-2], cos_TE.shape[-1])
    out_THD = keys_LKPD if rope is None else keys_LKPD.new_empty(q_THD.shape[-3:])
    block = 16 if tokens >= 512 else 1  # few tokens: many programs; many tokens: more work in each
    _write[triton.cdiv(tokens, block), heads + 2 * kv_heads](
        q_THD, k_TKD, v_TKD, cos_TE, sin_TE, slots_T, out_THD, keys_LKPD, values_LKPD,
        keys_LKPD if bias_N is None else bias_N, tokens, stride, *q_THD.stride()[-3:-1],
        *k_TKD.stride()[-3:-1], *v_TKD.stride()[-3:-1], cos_TE.stride(0), sin_TE.stride(0), HEADS=heads,
        KV_HEADS=kv_heads, DIM=dim, ROTATED=rotated, PAGE=keys_LKPD.shape[2], PARTS=parts,
        BIAS=bias_N is not None, BLOCK_T=block, BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4 if block > 1 else 1, **DEPENDENT,
    )  # fmt: skip
    return None if rope is None else out_THD


@triton.jit(do_not_specialize=["tokens", "part"])
def _write(
    q, k, v, cos, sin, slots, out, keys, values, bias, tokens, part,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, PAGE: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of a few tokens: of the queries, then of the keys, then of the values."""
    launch_dependents(PDL)
    t_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    head = tl.program_id(1)
    d_D = tl.arange(0, BLOCK_D)
    here_TD = (t_T < tokens)[:, None] & (d_D < DIM)[None, :]
    if head < HEADS:
        row_T1 = (q + t_T * q_token + head * q_head)[:, None]
        x_TD = _rotated(
            row_T1, bias + head * DIM, part, cos, sin, cos_token, sin_token, t_T, d_D, here_TD, ROTATED,
            PARTS, BIAS, out.dtype.element_ty, PDL,
        )  # fmt: skip
        at_TD = (t_T * HEADS + head)[:, None] * DIM + d_D[None, :]
        tl.store(out + at_TD, x_TD.to(out.dtype.element_ty), mask=here_TD)
    else:
        slot_T = tl.load(slots + t_T, mask=t_T < tokens, other=-1).to(tl.int64)
        kept_TD = here_TD & (slot_T >= 0)[:, None]
        kv_head = (head - HEADS) % KV_HEADS
        at_T = ((slot_T // PAGE) * KV_HEADS + kv_head) * PAGE + slot_T % PAGE
        at_TD = at_T[:, None] * DIM + d_D[None, :]
        if head < HEADS + KV_HEADS:
            row_T1 = (k + t_T * k_token + kv_head * k_head)[:, None]
            x_TD = _rotated(
                row_T1, bias + head * DIM, part, cos, sin, cos_token, sin_token, t_T, d_D, here_TD, ROTATED,
                PARTS, BIAS, keys.dtype.element_ty, PDL,
            )  # fmt: skip
            tl.store(keys + at_TD, x_TD.to(keys.dtype.element_ty), mask=kept_TD)
        else:
            row_T1 = (v + t_T * v_token + kv_head * v_head)[:, None]
            wait_for_previous(PDL)
            v_TD = _whole(row_T1, bias + head * DIM, part, d_D, here_TD, PARTS, BIAS, values.dtype.element_ty)
            tl.store(values + at_TD, v_TD.to(values.dtype.element_ty), mask=kept_TD)


@triton.jit
def _whole(row_T1, bias, part, d_D, here_TD, PARTS: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr):
    """Elements of rows in float32; of partial sums, what they and the bias come to, rounded as a product's
    output."""
    x_TD = tl.load(row_T1 + d_D[None, :], mask=here_TD, other=0.0).to(tl.float32)
    for s in tl.static_range(1, PARTS):
        x_TD += tl.load(row_T1 + s * part + d_D[None, :], mask=here_TD, other=0.0)
    if BIAS:
        x_TD += tl.load(tl.broadcast_to((bias + d_D)[None, :], here_TD.shape), mask=here_TD, other=0.0).to(
            tl.float32
        )
    if PARTS:
        x_TD = x_TD.to(KIND).to(tl.float32)
    return x_TD


@triton.jit
def _rotated(
    row_T1, bias, part, cos, sin, cos_token, sin_token, t_T, d_D, here_TD,
    ROTATED: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head of some tokens in float32, its first ROTATED elements turned by pairs that lie ROTATED / 2
    apart."""
    half: tl.constexpr = ROTATED // 2
    turned_TD = here_TD & (d_D < ROTATED)[None, :]
    pair_D = tl.where(d_D < half, d_D + half, d_D - half)
    c_TD = tl.load(cos + (t_T * cos_token)[:, None] + d_D[None, :], mask=turned_TD, other=1.0).to(tl.float32)
    s_TD = tl.load(sin + (t_T * sin_token)[:, None] + d_D[None, :], mask=turned_TD, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x_TD = _whole(row_T1, bias, part, d_D, here_TD, PARTS, BIAS, KIND)
    if ROTATED:
        y_TD = _whole(row_T1, bias, part, pair_D, turned_TD, PARTS, BIAS, KIND)
        # Fused by hand: the compiler may fuse one way here and another for blocks of other sizes, with other
        # bits.
        x_TD = tl.fma(tl.where((d_D < half)[None, :], -y_TD, y_TD), s_TD, x_TD * c_TD)
    return x_TD
