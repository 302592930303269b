"""The Triton kernel that writes keys and values into their pages, and rotates queries and keys on the way.

engine/backends/cuda/kernels/attention.py says how kernels are written here.

T tokens of the batch, H query heads, K KV heads, D head size, E half of it, X pages, P positions of a page.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.launch import kernel, wait_for_previous


def write_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    slots_T: torch.Tensor,
    keys_XKPD: torch.Tensor,
    values_XKPD: torch.Tensor,
    out_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values into their pages, in one launch.

    A head is rotated by pairs i and i + E (RoPE; Su et al., 2021), in float32.

    Args:
        q, k, v: [T, H or K, D], any strides between tokens and heads (views of a joined product will do).
        cos_TE, sin_TE: of each pair of a head, E = D / 2.
        slots_T: where each token goes: page * P + place in the page. A negative slot is written nowhere.
        out_THD: where to write the rotated queries, contiguous. Made if None.

    Returns:
        out_THD.
    """
    tokens, kv_heads, dim = k.shape
    heads, page = q.shape[1], keys_XKPD.shape[2]
    out_THD = keys_XKPD.new_empty(tokens, heads, dim) if out_THD is None else out_THD
    block = 16 if tokens >= 512 else 1  # few tokens: many programs; many tokens: more work in each
    _write[triton.cdiv(tokens, block), heads + 2 * kv_heads](
        q, k, v, cos_TE, sin_TE, slots_T, out_THD, keys_XKPD, values_XKPD, tokens, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], cos_TE.stride(0), sin_TE.stride(0), HEADS=heads, KV_HEADS=kv_heads,
        DIM=dim, PAGE=page, BLOCK_T=block, BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4 if block > 1 else 1,
    )  # fmt: skip
    return out_THD


# rows of a tensor: any number lies before
@kernel(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["slots"])
def _write(
    q, k, v, cos, sin, slots, out, keys, values, tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of a few tokens: of the queries, then of the keys, then of the values."""
    t_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    head = tl.program_id(1)
    d_D = tl.arange(0, BLOCK_D)
    here_TD = (t_T < tokens)[:, None] & (d_D < DIM)[None, :]
    half: tl.constexpr = DIM // 2
    angle_D = tl.where(d_D < half, d_D, d_D - half)
    cos_TD = tl.load(cos + (t_T * cos_token)[:, None] + angle_D[None, :], mask=here_TD, other=1.0)
    sin_TD = tl.load(sin + (t_T * sin_token)[:, None] + angle_D[None, :], mask=here_TD, other=0.0)
    cos_TD, sin_TD = cos_TD.to(tl.float32), sin_TD.to(tl.float32)
    wait_for_previous(PDL)
    if head < HEADS:
        x_TD, y_TD = load_head((q + t_T * q_token + head * q_head)[:, None], d_D, here_TD, DIM)
        x_TD = rotated(x_TD, y_TD, cos_TD, sin_TD, d_D, DIM)
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
            x_TD, y_TD = load_head(row_T1, d_D, here_TD, DIM)
            x_TD = rotated(x_TD, y_TD, cos_TD, sin_TD, d_D, DIM)
            tl.store(keys + at_TD, x_TD.to(keys.dtype.element_ty), mask=kept_TD)
        else:
            row_T1 = (v + t_T * v_token + kv_head * v_head)[:, None]
            v_TD = tl.load(row_T1 + d_D[None, :], mask=here_TD, other=0.0)
            tl.store(values + at_TD, v_TD.to(values.dtype.element_ty), mask=kept_TD)


@triton.jit
def load_head(row_T1, d_D, here_TD, DIM: tl.constexpr):
    """Heads of some rows in float32, [T, D], and the other of each pair, which lies DIM / 2 apart."""
    half: tl.constexpr = DIM // 2
    pair_D = tl.where(d_D < half, d_D + half, d_D - half)
    x_TD = tl.load(row_T1 + d_D[None, :], mask=here_TD, other=0.0).to(tl.float32)
    return x_TD, tl.load(row_T1 + pair_D[None, :], mask=here_TD, other=0.0).to(tl.float32)


@triton.jit
def rotated(x_TD, y_TD, cos_TD, sin_TD, d_D, DIM: tl.constexpr):
    """Heads and the other of each pair, rotated; angles are [T or 1, D]."""
    # Fused by hand: the compiler may fuse one way here and another for blocks of other sizes, with other
    # bits.
    signed_TD = tl.where((d_D < DIM // 2)[None, :], -y_TD, y_TD)
    return tl.fma(signed_TD, tl.broadcast_to(sin_TD, x_TD.shape), x_TD * cos_TD)
