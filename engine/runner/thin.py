"""Triton kernels for products of few rows: reading the weights is all of the work, and there is too little for cuBLAS.

A layer's products of a small model are read in a few microseconds, less than it takes a large tile's kernel to begin
and to end. Here the inner dimension is cut into parts until every multiprocessor has a program, and whoever reads the
product next (`add_rms_norm`, `write_pages`) sums the parts, in their order. A program asks for its weights before it
waits for the kernel before it (programmatic dependent launch), so that they are on their way by then.

T rows, N outputs, M inputs, S parts, I intermediate size.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.attention.launch import DEPENDENT, follow, lead
from engine.runner.fused import activated

FEW = 64  # rows up to which these are faster than cuBLAS's


def few_rows(dtype: torch.dtype) -> int:
    """Rows up to which products are thin: none in float32, whose exact products have no matrix instructions."""
    return FEW if dtype.itemsize == 2 else 0


def thin_product(x_TM: torch.Tensor, weight_NM: torch.Tensor) -> torch.Tensor:
    """Partial sums of x @ weight.T, float32 [S, T, N], to be added up in their order."""
    rows, (outputs, inputs) = len(x_TM), weight_NM.shape
    block_n, block_m, part, warps, stages = _blocks(rows, outputs, inputs, False)
    parts = triton.cdiv(inputs, part)
    out_STN = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x_TM.device)
    _launch(x_TM, weight_NM, out_STN, outputs, parts, part, block_n, block_m, warps, stages)
    return out_STN


def thin_gated(x_TM: torch.Tensor, weight_NM: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T), [T, I], of gate and up one below the other; rounded as `gated` rounds."""
    rows, (outputs, inputs) = len(x_TM), weight_NM.shape
    block_n, block_m, _, warps, stages = _blocks(rows, outputs, inputs, True)
    out_TI = x_TM.new_empty(rows, outputs // 2)
    how = dict(GATED=True, GELU=activation == "gelu_tanh")
    _launch(x_TM, weight_NM, out_TI, outputs // 2, 1, inputs, block_n, block_m, warps, stages, **how)
    return out_TI


def _blocks(rows: int, outputs: int, inputs: int, gated: bool) -> tuple[int, int, int, int, int]:
    """Outputs and inputs of a block, inputs of a part, warps, and stages of the pipeline."""
    return (32, 128, inputs, 4, 3) if gated else (32, 128, 256 if inputs < 2048 else 1024, 4, 3)


def _launch(x_TM, weight_NM, out, outputs, parts, part, block_n, block_m, warps, stages, GATED=False, GELU=False):
    rows, inputs = x_TM.shape
    block_t = min(64, max(16, triton.next_power_of_2(rows)))
    _thin[triton.cdiv(outputs, block_n), parts, triton.cdiv(rows, block_t)](
        x_TM, weight_NM, out, rows, x_TM.stride(0), weight_NM.stride(0),
        OUTPUTS=outputs, INPUTS=inputs, PART=part, GATED=GATED, GELU=GELU,
        BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps, num_stages=stages, **DEPENDENT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _thin(
    x, weight, out, rows, x_row, weight_row,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PART: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    lead(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_T = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * PART
    m_M = tl.arange(0, BLOCK_M)
    here_N, here_T = (n_N < OUTPUTS)[:, None], (t_T < rows)[:, None]
    weight_NM = weight + (n_N.to(tl.int64) * weight_row)[:, None] + (first + m_M)[None, :]
    x_TM = x + (t_T * x_row)[:, None] + (first + m_M)[None, :]
    left = INPUTS - first
    w_NM = tl.load(weight_NM, mask=here_N & (m_M < left)[None, :], other=0.0)
    up_NM = w_NM
    if GATED:
        up_NM = tl.load(weight_NM + OUTPUTS * weight_row, mask=here_N & (m_M < left)[None, :], other=0.0)
    follow(PDL)
    v_TM = tl.load(x_TM, mask=here_T & (m_M < left)[None, :], other=0.0)
    acc_TN = tl.dot(v_TM, tl.trans(w_NM), input_precision="ieee")
    up_TN = acc_TN
    if GATED:
        up_TN = tl.dot(v_TM, tl.trans(up_NM), input_precision="ieee")
    for at in range(BLOCK_M, PART, BLOCK_M):
        here_M = (at + m_M < left)[None, :]
        v_TM = tl.load(x_TM + at, mask=here_T & here_M, other=0.0)
        w_NM = tl.load(weight_NM + at, mask=here_N & here_M, other=0.0)
        acc_TN = tl.dot(v_TM, tl.trans(w_NM), acc_TN, input_precision="ieee")
        if GATED:
            up_NM = tl.load(weight_NM + OUTPUTS * weight_row + at, mask=here_N & here_M, other=0.0)
            up_TN = tl.dot(v_TM, tl.trans(up_NM), up_TN, input_precision="ieee")
    at_TN = (tl.program_id(1) * rows + t_T).to(tl.int64)[:, None] * OUTPUTS + n_N[None, :]
    here_TN = here_T & (n_N < OUTPUTS)[None, :]
    if GATED:
        acc_TN = activated(acc_TN, up_TN, out.dtype.element_ty, GELU)
    tl.store(out + at_TN, acc_TN.to(out.dtype.element_ty), mask=here_TN)
