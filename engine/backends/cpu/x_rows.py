"""Rows of a product's input as its weights want them: as they are, in bfloat16, or rounded to integers.

What is multiplied by int8 in quads is integers of 15 bits, each in two of 8: HIGH_STEP times the one and the
other, in two rows of int8. So rounding costs next to nothing beside that of the weights, and products take
half as many instructions as in float32. A row is rounded to nearest, symmetric, by what is in it and nothing
else.

T rows of a block, U rows of int8, two a row, Z slices of BLOCK_DEPTH inner steps, Y bytes of a row.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.jit import part
from engine.backends.cpu.simd import ITEM, LANES
from engine.backends.cpu.tile import HIGH_STEP, ZERO_BYTE
from engine.backends.cpu.vector_math import (
    BFLOAT16_ITEM,
    address,
    inverse_rms,
    max_abs,
    narrow,
    split_in_bytes,
)

# Rows that go through a panel together, and inner steps at a time: so many numbers stay in the second cache.
BLOCK_ROWS, BLOCK_DEPTH = 64, 768
LEVELS = 127  # of an int8 number, on either side of 0
TINY = np.float32(1e-30)  # a row of no larger numbers is zero: levels divided by less would be infinite
NO_NORM = -1.0  # in place of a norm's epsilon


class Own(NamedTuple):
    """A thread among those of a step, and its own memory: what it makes of a block of rows before it
    multiplies them."""

    thread: int
    threads: int
    factors_T: np.ndarray  # of a norm, of a row's scale, or of both
    starts_ZU: np.ndarray  # int32: what sums of rounded numbers begin at
    rows_UY: np.ndarray  # int8: rows in bfloat16, or rounded; of no size where they are read as they are


@part()
def make_rows(item, x_TM, begin, end, size, eps, own):
    """Make rows begin to end what products of x with `item` bytes a number read; return the address of
    factors, one a row, or 0 where there is none to multiply by."""
    if item == 1:
        _round_rows(x_TM, begin, end, size, eps, own)
        return address(own.factors_T)
    if item == BFLOAT16_ITEM:
        for t in range(begin, end):
            narrow(address(x_TM[t]), address(own.rows_UY[t - begin]), size)
    if eps < 0:
        return 0
    for t in range(begin, end):
        own.factors_T[t - begin] = inverse_rms(address(x_TM[t]), size, eps)
    return address(own.factors_T)


@part()
def _round_rows(x_TM, begin, end, size, eps, own):
    """Write rows as integers. A NaN or an infinity makes its row's factor one, and so the row's outputs."""
    most = np.float32(LEVELS * HIGH_STEP)
    for t in range(begin, end):
        x, high = address(x_TM[t]), 2 * (t - begin)
        norm = inverse_rms(x, size, eps) if eps >= 0 else np.float32(1.0)
        peak = np.float32(0.0)
        for m in range(0, size, LANES):
            here = max_abs(x + m * ITEM)
            peak = here if here > peak or here != here else peak
        scale = most / peak if peak > TINY else np.float32(0.0)
        own.factors_T[t - begin] = norm * (peak / most)
        to_high, to_low = address(own.rows_UY[high]), address(own.rows_UY[high + 1])
        for m in range(0, size, LANES):
            split_in_bytes(x + m * ITEM, scale, to_high + m, to_low + m)
        for u in range(high, high + 2):
            for k in range(0, size, BLOCK_DEPTH):
                total = np.int64(0)
                for m in range(k, min(k + BLOCK_DEPTH, size)):
                    total += own.rows_UY[u, np.uintp(m)]
                own.starts_ZU[k // BLOCK_DEPTH, u] = -ZERO_BYTE * total
