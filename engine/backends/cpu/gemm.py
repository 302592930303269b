"""Products of matrices: a few rows by a few vectors of outputs at a time, their sums in registers.

                                           a slice of a panel: BLOCK_DEPTH inner steps
                                           <-- W outputs: `vectors` x `lanes` -->
                                           +-----------+-----------+-----------+
                                    k = 0  |                                   |  stream 0 reads w[k, :]
                                        .  |                                   |
                                 size / 2  + - - - - - - - - - - - - - - - - - +
                                        .  |                                   |  stream 1 reads
                                        .  |                                   |  w[size / 2 + k, :]
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

This is the inner loop of every good matrix product (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008). Every sum is a chain of fused multiply-adds in the same order however many rows
there are: a row's result does not depend on its neighbours, to the last bit.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from engine.backends.cpu.jit import part
from engine.backends.cpu.simd import (
    AVX2,
    AVX512,
    F32,
    HAS_PAIR_PRODUCTS,
    I8,
    I16,
    I64,
    ITEM,
    NEON,
    REGISTERS,
    intrinsic,
)
from engine.backends.cpu.tile import PAIR, SIGNATURE, Tile, TileArguments, emit_tile

# Sums, the weights of an inner step and the numbers of a row or two share the registers. tests/test_gemm.py
# reads the machine code of each tile, for several processors, and finds none of them on the stack.
WIDE_TILES = {AVX2: Tile(8, 4, 3, 1), AVX512: Tile(16, 8, 3, 1), NEON: Tile(4, 7, 3, 1)}
NARROW_TILES = {AVX2: Tile(8, 3, 2, 2), AVX512: Tile(16, 8, 1, 2), NEON: Tile(4, 3, 4, 2)}
# Pairs of inner steps that become float32 leave registers for fewer sums.
WIDENED_TILES = {AVX2: Tile(8, 3, 3, 1), AVX512: Tile(16, 6, 3, 1), NEON: Tile(4, 6, 3, 1)}
WIDE_TILE, NARROW_TILE, WIDENED_TILE = (
    WIDE_TILES[REGISTERS],
    NARROW_TILES[REGISTERS],
    WIDENED_TILES[REGISTERS],
)
WIDE = WIDE_TILE.width  # outputs of a tile of a weight: a panel's
NARROW = NARROW_TILE.width  # outputs of a tile of keys or values, 16
# Of weights, as they are stored: float32, int8, or bfloat16 as 16 bits that NumPy has a name for.
NUMBERS = {types.float32: F32, types.int8: I8, types.uint16: PAIR if HAS_PAIR_PRODUCTS else I16}


def _tile_function(module: ir.Module, tile: Tile, number: ir.Type) -> ir.Function:
    """Return a module's function of a tile, written where it is not there yet.

    It is not inlined: the registers of its loop are its own.
    """
    name = tile.name(number)
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, SIGNATURE, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    emit_tile(function, tile, number)
    return function


@intrinsic
def takes_bfloat16(typing, kind):
    """Return whether products of weights of a dtype want x in bfloat16."""

    def call(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), NUMBERS[kind.dtype] == PAIR)

    return types.boolean(kind), call


def _call_by_rows(tallest: Tile, tallest_widened: Tile) -> Any:
    """Return a function of (rows, dtype of w, TileArguments) -> bytes prefetched, for 1 to a tallest tile's
    rows."""

    @intrinsic
    def tile(
        typing, rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, tiles
    ):  # fmt: skip
        def call(context, builder, signature, args):
            number = NUMBERS[kind.dtype]
            most = tallest_widened if number == I16 else tallest
            never, after = (builder.append_basic_block(name) for name in ("never", "after"))
            switch = builder.switch(args[0], never)
            builder.position_at_end(never)
            builder.unreachable()
            builder.position_at_end(after)
            prefetched = builder.phi(I64)
            for count in range(1, most.rows + 1):
                shape = most._replace(rows=count)
                function = _tile_function(builder.module, shape, number)
                block = builder.append_basic_block(function.name)
                switch.add_case(count, block)
                builder.position_at_end(block)
                prefetched.add_incoming(builder.call(function, args[2:]), block)
                builder.branch(after)
            builder.position_at_end(after)
            return prefetched

        return types.int64(types.int64, kind, *[types.int64] * len(TileArguments._fields)), call

    return tile


def _multiply(tallest: Tile, tallest_widened: Tile) -> Any:
    """Return a function of (rows, dtype of w, TileArguments but the last two, ahead, end) -> ahead.

    It divides rows evenly among as few tiles as possible: a tile of one row reads as many weights as one of
    many. Each tile prefetches on from where the one before it stopped, until `end`.
    """
    tile = _call_by_rows(tallest, tallest_widened)

    @intrinsic
    def most_rows(typing, kind):
        def call(context, builder, signature, args):
            return I64((tallest_widened if NUMBERS[kind.dtype] == I16 else tallest).rows)

        return types.int64(kind), call

    @part()
    def multiply(rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, end):
        scale_bytes = ITEM if row_scales != 0 else 0
        height = most_rows(kind)
        tiles = (rows + height - 1) // height
        lower = rows // max(tiles, 1)
        higher_tiles = rows - lower * tiles  # they have one row more
        for index in range(tiles):
            count = lower + 1 if index < higher_tiles else lower
            line = ahead if ahead < end else w  # to ask for what is there already costs nothing
            ahead += tile(
                count, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line, tiles
            )  # fmt: skip
            x, out, row_scales = x + count * x_row, out + count * out_row, row_scales + count * scale_bytes
        return ahead

    return multiply


multiply_wide = _multiply(WIDE_TILE, WIDENED_TILE)
multiply_narrow = _multiply(NARROW_TILE, NARROW_TILE)
