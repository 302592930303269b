"""The Triton kernel for products of one row, with what lies around them: five launches a layer.

A layer's weights of a small model are read in a few microseconds, and a launch takes one. So a product norms
its row as it reads it, adds its output to the residual stream, and leaves the sums of squares that the next
norm needs. It multiplies number by number: a matrix instruction would have 16 rows, of which 15 are nothing.
A program asks for its first weights before it waits for the kernel before it (programmatic dependent launch),
so that they are on their way by then.

M inputs, N outputs, P parts of a row's outputs, F intermediate size.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.launch import kernel, launch_dependents, prefetch_l2, wait_for_previous
from engine.backends.cuda.kernels.norm_activation import activated
from engine.models.decoder_parts import Norm

BLOCK = 1024  # inputs at a time
OUTPUTS, GATED_OUTPUTS = 8, 4  # of a program, a warp each; of a gated product both halves are read


class Unnormed(NamedTuple):
    """What a product has to know of its input's norm: RMSNorm, and the row's sum of squares in parts."""

    by: Norm
    squares_P: torch.Tensor


def row_product(
    x_1M: torch.Tensor,
    weight_NM: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    unnormed: Unnormed | None = None,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x @ weight.T + bias, [1, N].

    Args:
        unnormed: says that x is yet to be normed.
        ahead: a weight that is read soon after (`prefetch_l2`).
    """
    out_1N = x_1M.new_empty(1, len(weight_NM))
    _launch(x_1M, weight_NM, out_1N, OUTPUTS, bias_N=bias_N, unnormed=unnormed, ahead=ahead)
    return out_1N


def add_row_product(
    residual_1N: torch.Tensor, x_1M: torch.Tensor, weight_NM: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Add scale * (x @ weight.T) to the residual stream, in place, both rounded as a model rounds them.

    Returns:
        The sum of squares of the residual stream, float32 [P], in parts.
    """
    parts = triton.cdiv(len(weight_NM), OUTPUTS)
    squares_P = torch.empty(parts, dtype=torch.float32, device=x_1M.device)
    _launch(x_1M, weight_NM, residual_1N, OUTPUTS, squares_P=squares_P, scale=scale)
    return squares_P


def gated_row_product(
    x_1M: torch.Tensor, weight_NM: torch.Tensor, activation: str, unnormed: Unnormed | None = None
) -> torch.Tensor:
    """Return activation(x @ gate.T) * (x @ up.T), [1, F], of gate and up one below the other; rounded as
    `gated` rounds."""
    out_1F = x_1M.new_empty(1, len(weight_NM) // 2)
    _launch(x_1M, weight_NM, out_1F, GATED_OUTPUTS, activation=activation, unnormed=unnormed)
    return out_1F


def _launch(
    x_1M, weight_NM, out_1N, each, bias_N=None, unnormed=None, ahead=None, squares_P=None, scale=1.0,
    activation=None,
):  # fmt: skip
    outputs, inputs = out_1N.shape[1], x_1M.shape[1]
    by, squares = unnormed or (None, None)
    parts = 0 if squares is None else len(squares)
    _row[(triton.cdiv(outputs, each),)](
        x_1M, weight_NM, x_1M if bias_N is None else bias_N, x_1M if by is None else by.scale,
        x_1M if squares is None else squares, out_1N, out_1N if squares_P is None else squares_P,
        x_1M if ahead is None else ahead, 0.0 if by is None else by.eps, scale, weight_NM.stride(0),
        N=outputs, M=inputs, PARTS=parts, BIAS=bias_N is not None, ADD=squares_P is not None,
        GATED=activation is not None, GELU=activation == "gelu_tanh",
        AHEAD=0 if ahead is None else ahead.nbytes, BLOCK_N=each,
        BLOCK_M=min(BLOCK, triton.next_power_of_2(inputs)), BLOCK_P=triton.next_power_of_2(max(1, parts)),
        num_warps=each,
    )  # fmt: skip


@kernel()
def _row(
    x, weight, bias, norm, squares, out, out_squares, ahead, eps, scale, weight_row,
    N: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs."""
    launch_dependents(PDL)
    n_N, m_M = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    here_N = n_N < N
    weight_NM = weight + (n_N.to(tl.int64) * weight_row)[:, None] + m_M[None, :]
    here_NM = here_N[:, None] & (m_M < M)[None, :]
    w_NM = tl.load(weight_NM, mask=here_NM, other=0.0)
    up_NM = w_NM
    if GATED:
        up_NM = tl.load(weight_NM + N * weight_row, mask=here_NM, other=0.0)
    scale_M = m_M
    if PARTS:
        scale_M = tl.load(norm + m_M, mask=m_M < M, other=0.0)
    wait_for_previous(PDL)
    if AHEAD:
        prefetch_l2(ahead, AHEAD, tl.program_id(0), tl.num_programs(0), 32 * BLOCK_N, PDL)
    by = eps
    if PARTS:
        p_P = tl.arange(0, BLOCK_P)
        square = tl.sum(tl.load(squares + p_P, mask=p_P < PARTS, other=0.0), 0)
        by = 1.0 / tl.sqrt(square / M + eps)
    x_M = _normed(tl.load(x + m_M, mask=m_M < M, other=0.0), by, scale_M, PARTS)
    acc_NM = x_M[None, :] * w_NM.to(tl.float32)
    up_acc_NM = acc_NM
    if GATED:
        up_acc_NM = x_M[None, :] * up_NM.to(tl.float32)
    for at in tl.range(BLOCK_M, M, BLOCK_M, num_stages=3):
        here_M = at + m_M < M
        here_NM = here_N[:, None] & here_M[None, :]
        if PARTS:
            scale_M = tl.load(norm + at + m_M, mask=here_M, other=0.0)
        x_M = _normed(tl.load(x + at + m_M, mask=here_M, other=0.0), by, scale_M, PARTS)
        acc_NM += x_M[None, :] * tl.load(weight_NM + at, mask=here_NM, other=0.0).to(tl.float32)
        if GATED:
            up_NM = tl.load(weight_NM + N * weight_row + at, mask=here_NM, other=0.0)
            up_acc_NM += x_M[None, :] * up_NM.to(tl.float32)
    acc_N = tl.sum(acc_NM, 1)
    if BIAS:
        acc_N += tl.load(bias + n_N, mask=here_N, other=0.0).to(tl.float32)
    if GATED:
        acc_N = activated(acc_N, tl.sum(up_acc_NM, 1), out.dtype.element_ty, GELU)
    out_N = acc_N.to(out.dtype.element_ty)
    if ADD:
        residual_N = tl.load(out + n_N, mask=here_N, other=0.0).to(tl.float32)
        out_N = (scale * out_N.to(tl.float32) + residual_N).to(out.dtype.element_ty)
        wide_N = tl.where(here_N, out_N.to(tl.float32), 0.0)
        tl.store(out_squares + tl.program_id(0), tl.sum(wide_N * wide_N, 0))
    tl.store(out + n_N, out_N, mask=here_N)


@triton.jit
def _normed(x_M, by, scale_M, PARTS: tl.constexpr):
    """A row by what RMSNorm multiplies it by, rounded as `norm` rounds, or as it is; in float32."""
    if PARTS:
        return (x_M.to(tl.float32) * by * scale_M.to(tl.float32)).to(x_M.dtype).to(tl.float32)
    else:
        return x_M.to(tl.float32)
