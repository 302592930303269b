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

from engine.backends.cpu.gemm import WIDE, hardware_prefetch_rows, multiply_wide, x_item
from engine.backends.cpu.jit import part
from engine.backends.cpu.simd import ITEM, LANES
from engine.backends.cpu.threads import claim_first, claim_unit, first_unit
from engine.backends.cpu.vector_math import address, gelu, silu, soft_cap
from engine.backends.cpu.x_rows import BLOCK_DEPTH, BLOCK_ROWS, make_rows

# Numbers with types of their own, for parts are compiled for types: see `jit.part`.
OVERWRITE, ACCUMULATE = np.int64(0), np.int64(1)  # outputs of a product
NO_SOFTCAP = np.float32(0.0)


class Panels(NamedTuple):
    """Weights of a product in each layer, in the order in which they are read: float32, bfloat16 as uint16,
    or with scales int8, or that plus 128 as uint8."""

    # [L, C, inner size, W]; several inner steps together, uint16 [inner size / 2, W, 2], uint8 [.. / 4, W, 4]
    numbers: np.ndarray
    scales_LCW: np.ndarray  # of each output, or 0 panels


class Linear(NamedTuple):
    """A product's weights in one layer."""

    panels_CMW: np.ndarray
    scales_CW: np.ndarray  # or 0 panels
    bias_N: np.ndarray  # or none


class Block(NamedTuple):
    """Rows begin to end of a product's input."""

    begin: int
    end: int
    x: int  # address of the first
    x_row: int  # bytes from one to the next
    item: int  # bytes of a number
    size: int  # numbers of each
    row_scales: int  # address of factors, one a row, or 0
    row_starts: int  # address of what integer sums begin at, for each slice of the rows
    slice_bytes: int  # from those of a slice to those of the next


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
def _units(linear, panels_at_once, rows):
    """Return how many units a product of so many rows has, and how many of them are of one block."""
    per_block = len(linear.panels_CMW) // panels_at_once
    return (rows + BLOCK_ROWS - 1) // BLOCK_ROWS * per_block, per_block


@part()
def first_place(linear, panels_at_once, rows, own):
    """Return the addresses where the panel begins and ends that a thread begins a product with."""
    units, per_block = _units(linear, panels_at_once, rows)
    return _place(linear, first_unit(units, own.thread, own.threads) % per_block * panels_at_once)


@part()
def _place(linear, panel):
    """Return the addresses where a panel begins and ends."""
    panels_CMW = linear.panels_CMW
    size = panels_CMW.shape[1] * panels_CMW.shape[2] * panels_CMW.itemsize
    begin = address(panels_CMW) + panel * size
    return begin, begin + size


@part()
def _multiply_panel(block, linear, panel, ahead, end, out, out_row, accumulate):
    """Write (or add) a block's product by one panel, [rows, W], and prefetch memory meanwhile; return what is
    still `ahead`."""
    panels_CMW, scales_CW = linear.panels_CMW, linear.scales_CW
    item, scales = panels_CMW.itemsize, address(scales_CW) + panel * WIDE * ITEM if len(scales_CW) else 0
    (w, w_end), row_starts = _place(linear, panel), block.row_starts
    if ahead == w_end and block.end - block.begin <= hardware_prefetch_rows(panels_CMW.dtype):
        ahead = end  # the processor reads on by itself
    for k in range(0, block.size, BLOCK_DEPTH):
        ahead = multiply_wide(
            block.end - block.begin, panels_CMW.dtype, block.x + k * block.item, block.x_row,
            w + k * WIDE * item, WIDE * item, min(BLOCK_DEPTH, block.size - k), out, out_row,
            block.row_scales, row_starts, scales, 1 if accumulate or k > 0 else 0, ahead, end,
        )  # fmt: skip
        row_starts += block.slice_bytes
    return ahead


def _product(panels_at_once, write):
    """Return a part that multiplies the first `rows` of x, normed, by a linear layer.

    Threads share the product in units: a block of rows by a panel, or by `panels_at_once` of them. A unit is
    computed by write(block, linear, panel, ahead, end, target), which prefetches the memory from `ahead` to
    `end`, unless the processor does. A thread claims its next unit before it computes one. So what it
    prefetches is the next one's panel, or `following` with its last unit: the panel that it begins the
    product after this one with.
    """

    @part()
    def multiply(work, rows, x_TM, size, eps, linear, following, own, target):
        units, per_block = _units(linear, panels_at_once, rows)
        item = x_item(linear.panels_CMW.dtype)
        x_row = ITEM * x_TM.shape[1] if item == ITEM else own.rows_UY.shape[1]
        slice_bytes = ITEM * own.starts_ZU.shape[1]
        made, row_scales = -1, 0  # the block that is in the thread's own memory
        unit = claim_first(work, units, own.thread, own.threads)
        while unit < units:
            next_unit = claim_unit(work, units, own.thread, own.threads)
            index = unit // per_block
            begin = index * BLOCK_ROWS
            end = min(begin + BLOCK_ROWS, rows)
            if index != made:
                made, row_scales = index, make_rows(item, x_TM, begin, end, size, eps, own)
            x = address(x_TM) + begin * x_row if item == ITEM else address(own.rows_UY)
            if next_unit < units:
                ahead, ahead_end = _place(linear, next_unit % per_block * panels_at_once)
            else:
                ahead, ahead_end = following
            block = Block(begin, end, x, x_row, item, size, row_scales, address(own.starts_ZU), slice_bytes)
            write(block, linear, unit % per_block * panels_at_once, ahead, ahead_end, target)
            unit = next_unit

    return multiply


@part()
def _write_sums(block, linear, panel, ahead, end, target):
    """Store out (+)= norm(x) by a panel + bias, soft-capped, for rows of a block."""
    out_TN, bias_N, out_row = target.out_TN, linear.bias_N, target.out_TN.shape[1] * ITEM
    out = address(out_TN) + block.begin * out_row + panel * WIDE * ITEM
    _multiply_panel(block, linear, panel, ahead, end, out, out_row, target.accumulate)
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
def _write_gated(block, linear, panel, ahead, end, target):
    """Store out = activation(norm(x) by a panel of gates) * (norm(x) by the next panel, of values)."""
    both_2TW, bias_N, rows = target.both_2TW, linear.bias_N, block.end - block.begin
    gate, up, row = address(both_2TW[0]), address(both_2TW[1]), WIDE * ITEM
    values, values_end = _place(linear, panel + 1)
    _multiply_panel(block, linear, panel, values, values_end, gate, row, OVERWRITE)
    _multiply_panel(block, linear, panel + 1, ahead, end, up, row, OVERWRITE)
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
