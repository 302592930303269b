"""Linear layers: threads share a product, a block of rows by a panel of outputs at a time.

The picture in `engine.backends.cpu.gemm` shows both. Here the multiplication gets all that belongs to it: the
norm of its input before it; bias, soft cap and the activation of a gated MLP behind it.

T tokens of the step, M inputs, N outputs, F outputs of a gated MLP's first products, L layers, C panels of W
outputs.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.gemm import WIDE, multiply_wide, takes_bfloat16
from engine.backends.cpu.jit import part
from engine.backends.cpu.simd import ITEM, LANES
from engine.backends.cpu.threads import fetch_add
from engine.backends.cpu.vector_math import address, gelu, inverse_rms, narrow, silu, soft_cap

# Rows that go through a panel together, and inner steps at a time: so many numbers stay in the second cache.
BLOCK_ROWS, BLOCK_DEPTH = 64, 768
NO_NORM = -1.0  # in place of a norm's epsilon
# Numbers with types of their own, for parts are compiled for types: see `jit.part`.
OVERWRITE, ACCUMULATE = np.int64(0), np.int64(1)  # outputs of a product
NO_SOFTCAP = np.float32(0.0)


class Panels(NamedTuple):
    """Weights of a product in each layer, in the order in which they are read: float32, bfloat16 as uint16,
    or int8 with scales."""

    numbers: np.ndarray  # [L, C, inner size, W]; bfloat16 in pairs of inner steps, [inner size / 2, W, 2]
    scales_LCW: np.ndarray  # of each output, or 0 panels


class Linear(NamedTuple):
    """A product's weights in one layer."""

    panels_CMW: np.ndarray
    scales_CW: np.ndarray  # or 0 panels
    bias_N: np.ndarray  # or none


class Own(NamedTuple):
    """A thread's own memory: what it makes of a block of rows before it multiplies them."""

    norms_T: np.ndarray  # factors of a norm
    rows_TM: np.ndarray  # the rows as bfloat16, uint16; of no size where none is asked for


class Block(NamedTuple):
    """Rows begin to end of a product's input."""

    begin: int
    end: int
    x: int  # address of the first
    x_row: int  # bytes from one to the next
    item: int  # bytes of a number
    size: int  # numbers of each
    row_scales: int  # address of a norm's factors, one a row, or 0


class Store(NamedTuple):
    """A product's outputs as they are, and how they are stored."""

    out_TN: np.ndarray
    accumulate: np.int64  # OVERWRITE or ACCUMULATE
    softcap: np.float32


class Gate(NamedTuple):
    """Outputs of gates and values, and how each pair is made one."""

    out_TF: np.ndarray
    both_2TW: np.ndarray  # memory for a panel of gates and one of values
    gelu: bool


@part()
def layer_of(panels, bias_LN, layer):
    """Return a layer's Linear."""
    return Linear(panels.numbers[layer], panels.scales_LCW[layer], bias_LN[layer])


@part()
def _multiply_panel(block, linear, panel, next_panel, out, out_row, accumulate):
    """Write (or add) a block's product by one panel, [rows, W], and prefetch the next panel meanwhile."""
    panels_CMW, scales_CW = linear.panels_CMW, linear.scales_CW
    item, scales = panels_CMW.itemsize, address(scales_CW) + panel * WIDE * ITEM if len(scales_CW) else 0
    length = block.size * WIDE * item
    w, ahead = address(panels_CMW) + panel * length, address(panels_CMW) + next_panel * length
    end = ahead + length
    for k in range(0, block.size, BLOCK_DEPTH):
        ahead = multiply_wide(
            block.end - block.begin, panels_CMW.dtype, block.x + k * block.item, block.x_row,
            w + k * WIDE * item, WIDE * item, min(BLOCK_DEPTH, block.size - k), out, out_row,
            block.row_scales, scales, 1 if accumulate or k > 0 else 0, ahead, end,
        )  # fmt: skip


@part()
def _norm_rows(x_TM, begin, end, size, eps, norms_T):
    """Write a norm's factors of rows begin to end into norms_T; return their address, or 0 for no norm."""
    if eps < 0:
        return 0
    for t in range(begin, end):
        norms_T[t - begin] = inverse_rms(x_TM, t, np.int64(0), size, eps)
    return address(norms_T)


@part()
def _narrow_rows(x_TM, begin, end, size, rows_TM):
    """Write rows begin to end as bfloat16 into rows_TM."""
    for t in range(begin, end):
        x, out = address(x_TM[t]), address(rows_TM[t - begin])
        for m in range(0, size, LANES):
            narrow(x + m * ITEM, out + m * 2)


def _product(panels_at_once, write):
    """Return a part that multiplies the first `rows` of x, normed, by a linear layer.

    Threads share the product in units: a block of rows by a panel, or by `panels_at_once` of them. A unit is
    computed by write(block, linear, panel, next_panel, target). A thread takes the number of its next unit
    before it begins one, so that the one prefetches the panel of the next.
    """

    @part()
    def multiply(work, rows, x_TM, size, eps, linear, own, target):
        units_per_block, narrowed = (
            len(linear.panels_CMW) // panels_at_once,
            takes_bfloat16(linear.panels_CMW.dtype),
        )
        item = 2 if narrowed else ITEM
        x_row = item * (own.rows_TM.shape[1] if narrowed else x_TM.shape[1])
        units = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS * units_per_block
        normed, row_scales = -1, 0  # the block that is in the thread's own memory
        unit = fetch_add(work)
        while unit < units:
            next_unit = fetch_add(work)
            index = unit // units_per_block
            begin = index * BLOCK_ROWS
            end = min(begin + BLOCK_ROWS, rows)
            if index != normed:
                normed, row_scales = index, _norm_rows(x_TM, begin, end, size, eps, own.norms_T)
                if narrowed:
                    _narrow_rows(x_TM, begin, end, size, own.rows_TM)
            x = address(own.rows_TM) if narrowed else address(x_TM) + begin * x_row
            write(
                Block(begin, end, x, x_row, item, size, row_scales),
                linear,
                unit % units_per_block * panels_at_once,
                (next_unit if next_unit < units else unit) % units_per_block * panels_at_once,
                target,
            )
            unit = next_unit

    return multiply


@part()
def _write_sums(block, linear, panel, next_panel, target):
    """Store out (+)= norm(x) by a panel + bias, soft-capped, for rows of a block."""
    out_TN, bias_N, out_row = target.out_TN, linear.bias_N, target.out_TN.shape[1] * ITEM
    out = address(out_TN) + block.begin * out_row + panel * WIDE * ITEM
    _multiply_panel(block, linear, panel, next_panel, out, out_row, target.accumulate)
    if len(bias_N):
        for t in range(block.begin, block.end):
            for w in range(WIDE):
                column = np.uintp(panel * WIDE + w)
                out_TN[t, column] += bias_N[column]
    if target.softcap > 0:
        for t in range(block.end - block.begin):
            for n in range(0, WIDE, LANES):
                soft_cap(out + t * out_row + n * ITEM, target.softcap)


@part()
def _write_gated(block, linear, panel, next_panel, target):
    """Store out = activation(norm(x) by a panel of gates) * (norm(x) by the next panel, of values)."""
    both_2TW, bias_N, rows = target.both_2TW, linear.bias_N, block.end - block.begin
    gate, up, row = address(both_2TW[0]), address(both_2TW[1]), WIDE * ITEM
    _multiply_panel(block, linear, panel, panel + 1, gate, row, OVERWRITE)
    _multiply_panel(block, linear, panel + 1, next_panel, up, row, OVERWRITE)
    if len(bias_N):
        for half in range(2):
            for t in range(rows):
                for w in range(WIDE):
                    both_2TW[half, t, w] += bias_N[np.uintp((panel + half) * WIDE + w)]
    for at in range(0, rows * row, LANES * ITEM):
        if target.gelu:
            gelu(gate + at, up + at)
        else:
            silu(gate + at, up + at)
    for t in range(rows):
        for w in range(WIDE):
            target.out_TF[block.begin + t, np.uintp(panel // 2 * WIDE + w)] = both_2TW[0, t, w]


linear_product = _product(1, _write_sums)
gated_product = _product(2, _write_gated)
