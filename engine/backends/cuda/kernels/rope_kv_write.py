"""The Triton kernel that writes keys and values into their pages, and rotates queries and keys on the way.

engine/backends/cuda/kernels/attention.py says how kernels are written here.

T tokens of the batch, H query heads, K KV heads, D head size, E half of it, X pages, P positions of a page, S
parts of a sum, N outputs of a product.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.pdl import DEPENDENT, launch_dependents, wait_for_previous


def write_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    slots_T: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values into their pages, in one launch.

    A head is rotated by pairs i and i + E (RoPE; Su et al., 2021), in float32.

    Args:
        q, k, v: [T, H or K, D], any strides between tokens and heads (views of a joined product will do). Or
            [S, T, H or K, D], partial sums of a product of all three side by side (`split_k_product`).
        cos_TE, sin_TE: of each pair of a head, E = D / 2.
        slots_T: where each token goes: page * P + place in the page. A negative slot is written nowhere.
        bias_N: what partial sums still lack, for queries, keys and values.

    Returns:
        The rotated queries [T, H, D], contiguous.
    """
    parts, stride = (k.shape[0], k.stride(0)) if k.dim() == 4 else (0, 0)
    tokens, kv_heads, dim = k.shape[-3:]
    heads, page = q.shape[-2], keys_XKPD.shape[2]
    out_THD = keys_XKPD.new_empty(tokens, heads, dim)
    block = 16 if tokens >= 512 else 1  # few tokens: many programs; many tokens: more work in each
    _write[triton.cdiv(tokens, block), heads + 2 * kv_heads](
        q, k, v, cos_TE, sin_TE, slots_T, out_THD, keys_XKPD, values_XKPD,
        keys_XKPD if bias_N is None else bias_N, tokens, stride, *q.stride()[-3:-1], *k.stride()[-3:-1],
        *v.stride()[-3:-1], cos_TE.stride(0), sin_TE.stride(0), HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
        PAGE=page, PARTS=parts, BIAS=bias_N is not None, BLOCK_T=block, BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4 if block > 1 else 1, **DEPENDENT,
    )  # fmt: skip
    return out_THD


@triton.jit(do_not_specialize=["tokens", "part"])
def _write(
    q, k, v, cos, sin, slots, out, keys, values, bias, tokens, part,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
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
            row_T1, bias + head * DIM, part, cos, sin, cos_token, sin_token, t_T, d_D, here_TD, DIM,
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
                row_T1, bias + head * DIM, part, cos, sin, cos_token, sin_token, t_T, d_D, here_TD, DIM,
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
    DIM: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head of some tokens in float32, rotated by pairs that lie DIM / 2 apart."""
    half: tl.constexpr = DIM // 2
    pair_D = tl.where(d_D < half, d_D + half, d_D - half)
    angle_D = tl.where(d_D < half, d_D, d_D - half)
    c_TD = tl.load(cos + (t_T * cos_token)[:, None] + angle_D[None, :], mask=here_TD, other=1.0).to(
        tl.float32
    )
    s_TD = tl.load(sin + (t_T * sin_token)[:, None] + angle_D[None, :], mask=here_TD, other=0.0).to(
        tl.float32
    )
    wait_for_previous(PDL)
    x_TD = _whole(row_T1, bias, part, d_D, here_TD, PARTS, BIAS, KIND)
    y_TD = _whole(row_T1, bias, part, pair_D, here_TD, PARTS, BIAS, KIND)
    # Fused by hand: the compiler may fuse one way here and another for blocks of other sizes, with other
    # bits.
    return tl.fma(tl.where((d_D < half)[None, :], -y_TD, y_TD), s_TD, x_TD * c_TD)
