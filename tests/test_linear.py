"""Which memory a thread asks for: the panel that it begins a product with, and the one after each."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from engine.backends.cpu import gemm
from engine.backends.cpu.linear import OVERWRITE, Block, Linear, _multiply_panel, first_place
from engine.backends.cpu.simd import ITEM
from engine.backends.cpu.vector_math import address
from engine.backends.cpu.x_rows import BLOCK_ROWS, Own


@njit
def begin_with(linear, panels_at_once, rows, own):
    return first_place(linear, panels_at_once, rows, own)


@pytest.mark.parametrize(("panels_at_once", "rows", "threads", "first"), [
    (1, 1, 4, [0, 1, 3, 4]),
    (2, 1, 2, [0, 2]),
    (2, 1, 5, [0, 0, 2, 2, 4]),
    (1, 3 * BLOCK_ROWS, 2, [0, 3]),
    (1, 2 * BLOCK_ROWS, 2, [0, 0]),
])  # fmt: skip
def test_threads_know_which_panel_they_begin_a_product_with(panels_at_once, rows, threads, first):
    """That of the first unit of their share, though there may be more threads than panels."""
    panels_CMW, none = np.zeros((6, 8, gemm.WIDE), np.float32), np.zeros((0, gemm.WIDE), np.float32)
    starts, made = np.zeros((0, 0), np.int32), np.zeros((0, 0), np.int8)
    for thread, panel in enumerate(first):
        own = Own(thread, threads, none[0:0, 0], starts, made)
        begin, end = begin_with(Linear(panels_CMW, none, none[:, 0]), panels_at_once, rows, own)
        place = panels_CMW[panel].ctypes.data
        assert (begin, end) == (place, place + panels_CMW[panel].nbytes)


@njit
def multiply_first(linear, x, rows, ahead, end, out):
    size, x_row, none = np.int64(x.shape[1]), np.int64(ITEM * x.shape[1]), np.int64(0)
    block = Block(none, rows, address(x), x_row, np.int64(ITEM), size, none, none, none)
    return _multiply_panel(block, linear, none, ahead, end, address(out), ITEM * out.shape[1], OVERWRITE)


@pytest.mark.parametrize("rows", [1, gemm.WIDE_TILE.rows, gemm.WIDE_TILE.rows + 1])
def test_a_few_rows_leave_the_panel_that_comes_next_to_the_processor(rows):
    """But no other panel."""
    panels_CMW, none = np.ones((4, 64, gemm.WIDE), np.float32), np.zeros((0, gemm.WIDE), np.float32)
    linear, size = Linear(panels_CMW, none, none[:, 0]), panels_CMW[0].nbytes
    few = rows <= gemm.HARDWARE_PREFETCH_ROWS.get(gemm.F32, 0)
    for panel in (1, 2):
        x, out = np.ones((rows, 64), np.float32), np.zeros((rows, gemm.WIDE), np.float32)
        ahead = panels_CMW[panel].ctypes.data
        asked = multiply_first(linear, x, rows, ahead, ahead + size, out) - ahead
        assert (out == 64).all()
        assert asked >= 2 * size if few and panel == 1 else 0.9 * size < asked <= size
