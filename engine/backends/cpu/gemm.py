"""Products of matrices: a few rows by a few vectors of outputs at a time, their sums in registers.

                                           a slice of a panel: BLOCK_DEPTH inner steps
                                           <-- W outputs: `vectors` x `lanes` -->
                                           +-----------+-----------+-----------+
                                    k = 0  |                                   |  an iteration reads w[k, :]
                                        .  |                                   |  and then w[k + 1, :]
                                        .  |                                   |
             inner steps, `size` of them   +-----------+-----------+-----------+

            +-------------+-------------+  +-----------+-----------+-----------+
    a tile  | x[0, k]     |             |  |    sum    |    sum    |    sum    |
            | x[1, k]     |             |  |    sum    |    sum    |    sum    |  in registers until
            |   ...       |             |  |           |           |           |  the slice ends
            | x[7, k]     |             |  |    sum    |    sum    |    sum    |
            +-------------+-------------+  +-----------+-----------+-----------+
  the next  | x[8, k]     |             |  |           |           |           |
            |   ...       |             |  |           |           |           |
            +-------------+-------------+  +-----------+-----------+-----------+
            a block: BLOCK_ROWS rows of x   what it adds to: a panel's outputs of the block's rows

A weight lies in memory panel by panel, and in a panel inner step by inner step. A thread takes a block and a
panel (`engine.backends.cpu.linear`); the block goes through the panel slice by slice, tile by tile.

In a tile, an inner step loads the vectors of w[k, :]; for each row it broadcasts x[r, k], and multiplies and
adds that to the row's sums. With AVX-512, 8 rows x 3 vectors of sums, 3 vectors of weights and a broadcast
number or two share 32 registers, and 24 multiply-adds need 3 + 8 loads.

Weights in bfloat16 lie in pairs of inner steps: of every output w[k, n] and then w[k + 1, n], as 32 bits. The
one is these bits shifted by 16, the other their upper half, for a bfloat16 is the upper half of a float32. A
processor that multiplies such pairs (AVX512_BF16) does so, in half the instructions; x is in bfloat16 then.
One with a matrix unit (AMX) multiplies them by its own tiles: `engine.backends.cpu.matrix_tile`.
Weights in int8 are made float32 as they are loaded, or, where a processor multiplies four bytes by four at a
time (AVX512_VNNI, AVX_VNNI), lie in quads of inner steps, and x is rounded to integers of 15 bits, two int8
each: `engine.backends.cpu.x_rows`.
Attention multiplies by keys and values in their pages, wherever these lie: `engine.backends.cpu.paged_tile`.

This is the inner loop of every good matrix product (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008). Every sum is a chain of fused multiply-adds in the same order however many rows
there are: a row's result does not depend on its neighbours, to the last bit.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from engine.backends.cpu import matrix_tile, paged_tile
from engine.backends.cpu.jit import part
from engine.backends.cpu.paged_tile import PART, PREFIX, emit_paged_tile
from engine.backends.cpu.simd import (
    AVX2,
    AVX512,
    F32,
    HAS_PAIR_PRODUCTS,
    HAS_QUAD_PRODUCTS,
    I8,
    I16,
    I64,
    ITEM,
    NEON,
    REGISTERS,
    X86,
    intrinsic,
)
from engine.backends.cpu.tile import PAIR, QUAD, SIGNATURE, TILED, X_ITEMS, X_PARTS, Tile, emit_tile

# Sums, the weights of an inner step and the numbers of a row or two share the registers. tests/test_gemm.py
# reads the machine code of each tile's loop, for several processors, and finds none of them on the stack.
WIDE_TILES = {AVX2: Tile(8, 4, 3, 1), AVX512: Tile(16, 8, 3, 1), NEON: Tile(4, 7, 3, 1)}
PAGED_TILES = {AVX2: Tile(8, 3, 2, 2), AVX512: Tile(16, 6, 2, 2), NEON: Tile(4, 3, 4, 2)}
# Pairs of inner steps that become float32 leave registers for fewer sums.
WIDENED_TILES = {AVX2: Tile(8, 3, 3, 1), AVX512: Tile(16, 6, 3, 1), NEON: Tile(4, 6, 3, 1)}
PAGED_WIDENED_TILES = {AVX2: Tile(8, 2, 2, 2), AVX512: Tile(16, 5, 2, 2), NEON: Tile(4, 2, 4, 2)}
WIDE_TILE, PAGED_TILE = WIDE_TILES[REGISTERS], PAGED_TILES[REGISTERS]
WIDENED_TILE, PAGED_WIDENED_TILE = WIDENED_TILES[REGISTERS], PAGED_WIDENED_TILES[REGISTERS]
WIDE = WIDE_TILE.width  # outputs of a tile of a weight: a panel's
PARTS = PAGED_TILE.width // PART  # of a tile of keys or values
# Of weights, as they are stored: float32, int8 one by one or (as uint8) in quads, or bfloat16 as 16 bits that
# NumPy has a name for, without a sign or (for a matrix unit) with one.
NUMBERS: dict[Any, ir.Type] = {
    types.float32: F32,
    types.int8: I8,
    types.uint16: PAIR if HAS_PAIR_PRODUCTS else I16,
}
NUMBERS |= {types.uint8: QUAD} if HAS_QUAD_PRODUCTS else {}
NUMBERS |= {types.int16: TILED} if matrix_tile.HAS_MATRIX_UNIT else {}
# The tallest tile of each type of weights, and of keys and values, which are float32 or bfloat16 as well.
WIDE_TALLEST = dict.fromkeys((F32, I8, PAIR), WIDE_TILE) | {I16: WIDENED_TILE}
WIDE_TALLEST |= {QUAD: WIDE_TILE._replace(rows=WIDE_TILE.rows // X_PARTS[QUAD])}
WIDE_TALLEST |= {TILED: WIDE_TILE._replace(rows=2 * matrix_tile.ROWS)}
# Up to so many rows, panels in order are read fastest if the processor alone reads ahead: on a Zen 4, to ask
# for the next panel as well cost up to a third. (On ARM nothing was measured.)
HARDWARE_PREFETCH_ROWS = {F32: WIDE_TILE.rows, PAIR: WIDE_TILE.rows, QUAD: 2, I16: 1} if X86 else {}
PAGED_TALLEST = {F32: PAGED_TILE, PAIR: PAGED_TILE, I16: PAGED_WIDENED_TILE}


def _tile_function(
    module: ir.Module, name: str, called: ir.FunctionType, emit: Callable[[ir.Function], None]
) -> ir.Function:
    """Return a module's function of a tile, written where it is not there yet.

    It is not inlined: the registers of its loop are its own.
    """
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, called, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    emit(function)
    return function


def x_item_of(number: ir.Type) -> int:
    """Return the bytes of a number of x in products of weights of a type: 4 is float32, 2 bfloat16, 1 int8 in
    two rows."""
    return X_ITEMS.get(number, ITEM)


def _call_tiled(builder: ir.IRBuilder, tallest: Tile, rows: ir.Value, operands: list[ir.Value]) -> ir.Value:
    """Write a call of the function of a matrix unit's tiles for so many rows."""
    found = []
    few = builder.icmp_signed("<=", rows, I64(matrix_tile.ROWS))
    with builder.if_else(few) as branches:
        for branch, most in zip(branches, (matrix_tile.ROWS, tallest.rows), strict=True):
            with branch:
                tile = tallest._replace(rows=most)
                emit = partial(matrix_tile.emit_matrix_tile, tile=tile)
                name, called = tile.name(TILED), matrix_tile.SIGNATURE
                function = _tile_function(builder.module, name, called, emit)
                found.append((builder.call(function, [rows, *operands]), builder.block))
    prefetched = builder.phi(I64)
    for value, block in found:
        prefetched.add_incoming(value, block)
    return prefetched


def _call_by_rows(
    tallest: dict[ir.Type, Tile], prefix: str, called: ir.FunctionType, emit: Callable[..., None]
) -> Any:
    """Return a function of (rows, dtype of w, arguments of a tile), for 1 to a tallest tile's rows.

    Args:
        prefix, called, emit: of the names of the tiles' functions, their type, and what writes their bodies.
    """
    result = types.void if isinstance(called.return_type, ir.VoidType) else types.int64

    @intrinsic
    def tile(typing, rows, dtype, arguments):
        def call(context, builder, signature, args):
            number = NUMBERS[dtype.dtype]
            most, operands = tallest[number], cgutils.unpack_tuple(builder, args[2])
            if number == TILED:
                return _call_tiled(builder, most, args[0], operands)
            never, after = (builder.append_basic_block(name) for name in ("never", "after"))
            switch = builder.switch(args[0], never)
            builder.position_at_end(never)
            builder.unreachable()
            found = []
            for count in range(1, most.rows + 1):
                shape = most._replace(rows=count)
                write = partial(emit, tile=shape, number=number)
                name = prefix + shape.name(number)
                function = _tile_function(builder.module, name, called, write)
                block = builder.append_basic_block(function.name)
                switch.add_case(count, block)
                builder.position_at_end(block)
                found.append((builder.call(function, operands), block))
                builder.branch(after)
            builder.position_at_end(after)
            if result == types.void:
                return context.get_dummy_value()
            value = builder.phi(I64)
            for made, block in found:
                value.add_incoming(made, block)
            return value

        return result(types.int64, dtype, arguments), call

    return tile


def _constant(of: Callable[[ir.Type], int]) -> Any:
    """Return a function of a dtype of weights, whose value is known when it is compiled."""

    @intrinsic
    def constant(typing, dtype):
        def call(context, builder, signature, args):
            return I64(of(NUMBERS[dtype.dtype]))

        return types.int64(dtype), call

    return constant


_wide = _call_by_rows(WIDE_TALLEST, "", SIGNATURE, emit_tile)
_wide_rows = _constant(lambda number: WIDE_TALLEST[number].rows)
_x_parts = _constant(lambda number: X_PARTS.get(number, 1))
_paged = _call_by_rows(PAGED_TALLEST, PREFIX, paged_tile.SIGNATURE, emit_paged_tile)
hardware_prefetch_rows = _constant(lambda number: HARDWARE_PREFETCH_ROWS.get(number, 0))
_paged_rows = _constant(lambda number: PAGED_TALLEST[number].rows)
x_item = _constant(x_item_of)


@part()
def _divide(rows, height):
    """Return among how many tiles rows are divided evenly, as few as possible, what each has, and how many of
    them have one row more: a tile of one row reads as many weights as one of many."""
    tiles = (rows + height - 1) // height
    lower = rows // max(tiles, 1)
    return tiles, lower, rows - lower * tiles


@part()
def multiply_wide(
    rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, row_starts, scales, add, ahead, end
):  # fmt: skip
    """Multiply rows by a slice of a panel, of dtype `kind`: TileArguments but the last two. Return what is
    still `ahead`: each tile prefetches on from where the one before it stopped, until `end`."""
    scale_bytes, parts = ITEM if row_scales != 0 else 0, _x_parts(kind)
    tiles, lower, higher_tiles = _divide(rows, _wide_rows(kind))
    for index in range(tiles):
        count = lower + 1 if index < higher_tiles else lower
        line = ahead if ahead < end else w  # to ask for what is there already costs nothing
        ahead += _wide(
            count,
            kind,
            (x, x_row, w, w_row, size, out, out_row, row_scales, row_starts, scales, add, line, tiles),
        )
        x, out = x + count * parts * x_row, out + count * out_row
        row_scales, row_starts = row_scales + count * scale_bytes, row_starts + count * parts * ITEM
    return ahead


@part()
def multiply_paged(rows, kind, x, x_row, x_page, pages, offset, count, w_row, size, out, out_row, add, ahead):
    """Multiply rows by parts of pages, of dtype `kind`: PagedArguments. The first tile of rows prefetches for
    all of them."""
    tiles, lower, higher_tiles = _divide(rows, _paged_rows(kind))
    for index in range(tiles):
        taken = lower + 1 if index < higher_tiles else lower
        _paged(taken, kind, (x, x_row, x_page, pages, offset, count, w_row, size, out, out_row, add, ahead))
        x, out, ahead = x + taken * x_row, out + taken * out_row, pages
