"""Triton kernels for products of few rows: reading the weights is all of the work, and there is too little
for cuBLAS.

A layer's products of a small model are read in a few microseconds, less than it takes a large tile's kernel
to begin and to end. Here the inner dimension is cut into parts until every multiprocessor has a program, and
whoever reads the product next (`add_norm`, `norm`, `attend_rows`) sums the parts, in their order. A program
asks for its weights before it waits for the kernel before it (programmatic dependent launch), so that they
are on their way by then.

T rows, N outputs, M inputs, S parts, F intermediate size.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.backends.cuda.kernels.launch import kernel, launch_dependents, prefetch_l2, wait_for_previous
from engine.backends.cuda.kernels.norm_activation import activated

MAX_ROWS = 48  # up to which these are faster than cuBLAS's: at 64 they are equal
MAX_LAYER_BYTES = 2**26  # of weights, beyond which a kernel's beginning and end do not matter
TILE = 64  # outputs of a program, at most
BLOCK = 256  # inputs that are read before the kernel before has ended


def max_split_rows(dtype: torch.dtype, layer_bytes: int) -> int:
    """Rows up to which the products of a layer are split: none in float32, whose exact products have no
    matrix units."""
    return MAX_ROWS if dtype.itemsize == 2 and layer_bytes <= MAX_LAYER_BYTES else 0


def split_k_product(
    x_TM: torch.Tensor, weight_NM: torch.Tensor, ahead: torch.Tensor | None = None
) -> torch.Tensor:
    """Partial sums of x @ weight.T, float32 [S, T, N], to be added up in their order.

    Args:
        ahead: a weight that is read soon after (`prefetch_l2`).
    """
    rows, (outputs, inputs) = len(x_TM), weight_NM.shape
    shape = _product_shape(outputs, inputs)
    out_STN = torch.empty(
        triton.cdiv(inputs, shape.part), rows, outputs, dtype=torch.float32, device=x_TM.device
    )
    _launch(x_TM, weight_NM, out_STN, outputs, shape, ahead=ahead)
    return out_STN


def split_k_gated(x_TM: torch.Tensor, weight_NM: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T), [T, F], of gate and up one below the other; rounded as `gated`
    rounds."""
    rows, (outputs, inputs) = len(x_TM), weight_NM.shape
    out_TF = x_TM.new_empty(rows, outputs // 2)
    _launch(x_TM, weight_NM, out_TF, outputs // 2, _gated_shape(outputs // 2, inputs), activation)
    return out_TF


class Shape(NamedTuple):
    """Of a launch: outputs of a program, inputs of a part and of a block, warps, stages of the pipeline."""

    each: int
    part: int
    block: int
    warps: int
    stages: int


def _product_shape(outputs: int, inputs: int) -> Shape:
    """Parts of whole blocks, as many as make about two programs a multiprocessor."""
    parts = max(1, 2 * _processors() // triton.cdiv(outputs, TILE))
    return Shape(TILE, max(1, inputs // parts // BLOCK) * BLOCK, BLOCK, 4, 3)


def _gated_shape(outputs: int, inputs: int) -> Shape:
    """All inputs in one part, for an activation is of whole sums; as much work for every multiprocessor."""
    programs = _processors() * triton.cdiv(outputs, TILE * _processors())
    return Shape(max(16, triton.cdiv(outputs, programs)), inputs, BLOCK // 2, 4, 3)


@cache
def _processors() -> int:
    """Multiprocessors of the GPU; an H100's where there is none."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def _launch(x_TM, weight_NM, out, outputs, shape, activation=None, ahead=None):
    rows, inputs = x_TM.shape
    block_t = min(64, max(16, triton.next_power_of_2(rows)))
    _split_k[triton.cdiv(outputs, shape.each), triton.cdiv(inputs, shape.part), triton.cdiv(rows, block_t)](
        x_TM, weight_NM, out, x_TM if ahead is None else ahead, rows, x_TM.stride(0), weight_NM.stride(0),
        OUTPUTS=outputs, INPUTS=inputs, EACH=shape.each, PART=min(shape.part, inputs),
        GATED=activation is not None, GELU=activation == "gelu_tanh",
        AHEAD=0 if ahead is None else ahead.nbytes, BLOCK_T=block_t,
        BLOCK_N=max(16, triton.next_power_of_2(shape.each)), BLOCK_M=shape.block, num_warps=shape.warps,
        num_stages=shape.stages,
    )  # fmt: skip


@kernel(do_not_specialize=["rows"])
def _split_k(
    x, weight, out, ahead, rows, x_row, weight_row, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    EACH: tl.constexpr, PART: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    n_N = tl.program_id(0) * EACH + tl.arange(0, BLOCK_N)
    t_T = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * PART
    m_M = tl.arange(0, BLOCK_M)
    here_N1 = ((tl.arange(0, BLOCK_N) < EACH) & (n_N < OUTPUTS))[:, None]
    here_T1 = (t_T < rows)[:, None]
    weight_NM = weight + (n_N.to(tl.int64) * weight_row)[:, None] + (first + m_M)[None, :]
    x_TM = x + (t_T * x_row)[:, None] + (first + m_M)[None, :]
    left = INPUTS - first
    w_NM = tl.load(weight_NM, mask=here_N1 & (m_M < left)[None, :], other=0.0)
    up_NM = w_NM
    if GATED:
        up_NM = tl.load(weight_NM + OUTPUTS * weight_row, mask=here_N1 & (m_M < left)[None, :], other=0.0)
    wait_for_previous(PDL)
    if AHEAD:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        prefetch_l2(ahead, AHEAD, program, tl.num_programs(0) * tl.num_programs(1), 128, PDL)
    v_TM = tl.load(x_TM, mask=here_T1 & (m_M < left)[None, :], other=0.0)
    acc_TN = tl.dot(v_TM, tl.trans(w_NM), input_precision="ieee")
    up_TN = acc_TN
    if GATED:
        up_TN = tl.dot(v_TM, tl.trans(up_NM), input_precision="ieee")
    for at in range(BLOCK_M, PART, BLOCK_M):
        here_M = (at + m_M < left)[None, :]
        v_TM = tl.load(x_TM + at, mask=here_T1 & here_M, other=0.0)
        w_NM = tl.load(weight_NM + at, mask=here_N1 & here_M, other=0.0)
        acc_TN = tl.dot(v_TM, tl.trans(w_NM), acc_TN, input_precision="ieee")
        if GATED:
            up_NM = tl.load(weight_NM + OUTPUTS * weight_row + at, mask=here_N1 & here_M, other=0.0)
            up_TN = tl.dot(v_TM, tl.trans(up_NM), up_TN, input_precision="ieee")
    at_TN = (tl.program_id(1) * rows + t_T).to(tl.int64)[:, None] * OUTPUTS + n_N[None, :]
    here_TN = here_T1 & tl.trans(here_N1)
    if GATED:
        acc_TN = activated(acc_TN, up_TN, out.dtype.element_ty, GELU)
    tl.store(out + at_TN, acc_TN.to(out.dtype.element_ty), mask=here_TN)
