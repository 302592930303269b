"""Products by a processor's own matrix unit: tiles of 16 rows by 64 bytes (Intel's AMX).

                                            registers 0 to 2, and 3 to 5 for rows 16 to 31: sums
      register 6: x, 16 rows                +-------------+-------------+-------------+
      +---------------------+               | 16 x 16 f32 | 16 x 16     | 16 x 16     |
      | 32 inner steps, 16  |   times       +-------------+-------------+-------------+
      | pairs of bfloat16   |               register 7, one third after the other: w, 16 pairs of inner steps
      +---------------------+               of 16 outputs each

An instruction multiplies a tile of x by one of w and adds that to 256 sums, each pair after pair: a row's
sums do not depend on its neighbours. Weights lie as they do for products of pairs
(`engine.backends.cpu.tile`). Names and meanings are those of Intel's Architecture Instruction Set Extensions
Reference, chapter 3.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import ctypes
import platform

from llvmlite import ir

from engine.backends.cpu.simd import (
    CACHE_LINE,
    FEATURES,
    HAS_PAIR_PRODUCTS,
    I8,
    I16,
    I64,
    ITEM,
    Loop,
    declared,
)
from engine.backends.cpu.tile import TILED, Tile, TileArguments, TileWriter

ROWS, ROW_BYTES = 16, 64  # of a tile
STEPS = 32  # inner steps of a tile
X, W = 6, 7  # registers
PALETTE, COLUMNS_AT, ROWS_AT = 1, 16, 48  # of a configuration of 64 bytes
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64
SIGNATURE = ir.FunctionType(I64, [I64] * (1 + len(TileArguments._fields)))  # the rows before the others


def allowed() -> bool:
    """Ask the system for tiles, on a processor that has them; return whether this process may use them.

    They make a thread's state 8 KiB larger, so Linux (since 5.16) gives them to those alone that ask.
    """
    if platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


HAS_MATRIX_UNIT = HAS_PAIR_PRODUCTS and {"+amx-tile", "+amx-bf16"} <= set(FEATURES) and allowed()


def emit_matrix_tile(function: ir.Function, tile: Tile, prefix: str = "llvm.x86.") -> None:
    """Write the body of a function of (rows, TileArguments) that does what `emit_tile`'s do of a PAIR.

    Args:
        tile: of 16 rows at most, or 32: as many are computed if there are more than 16, and those that were
            asked for are stored. Memory of x has all of them. Inner steps are a multiple of STEPS.
        prefix: of the names of the instructions, for who emulates them.
    """
    b = ir.IRBuilder(function.append_basic_block("entry"))
    rows, args = function.args[0], TileArguments(*function.args[1:])
    unit = _Unit(b, prefix)
    halves, width = -(-tile.rows // ROWS), tile.vectors * ROW_BYTES
    sums = unit.memory(halves * ROWS * width)
    unit.configure(rows if halves == 1 else I64(ROWS))
    for register in range(halves * tile.vectors):
        unit("tilezero", I8(register))
    iterations, bytes_read = b.udiv(args.size, I64(STEPS)), STEPS * tile.width * 2
    pace, w_stride = b.udiv(I64(bytes_read), args.tiles), b.mul(args.w_row, I64(2))
    loop = Loop(b)
    i, x, w, line = (loop.carry(start) for start in (I64(0), args.x, args.w, args.ahead))
    for v in range(tile.vectors):
        unit.load(W, b.add(w, I64(ROW_BYTES * v)), w_stride)
        for half in range(halves):
            if halves > 1 or v == 0:
                unit.load(X, b.add(x, b.mul(args.x_row, I64(ROWS * half))), args.x_row)
            unit("tdpbf16ps", I8(half * tile.vectors + v), I8(X), I8(W))
    writer = TileWriter(b, tile._replace(rows=1), TILED, args)
    writer.prefetch_lines(line, bytes_read)
    next_i = b.add(i, I64(1))
    following = [
        (i, next_i),
        (x, b.add(x, I64(2 * STEPS))),
        (w, b.add(w, b.mul(args.w_row, I64(STEPS)))),
        (line, b.add(line, pace)),
    ]
    loop.end(following, again=b.icmp_signed("<", next_i, iterations))
    for half in range(halves):
        for v in range(tile.vectors):
            at = b.add(sums, I64(half * ROWS * width + ROW_BYTES * v))
            unit("tilestored64", I8(half * tile.vectors + v), unit.pointer(at), I64(width))
    unit("tilerelease")
    each = Loop(b)
    r, total = each.carry(I64(0)), each.carry(sums)
    scaled = b.icmp_signed("!=", args.row_scales, I64(0))
    row_scale = b.select(scaled, b.add(args.row_scales, b.mul(r, I64(ITEM))), I64(0))
    writer.args = args._replace(row_scales=row_scale, out=b.add(args.out, b.mul(r, args.out_row)))
    vectors = range(tile.vectors)
    writer.scale_add_and_store({(0, 0, v): writer.load(b.add(total, I64(ROW_BYTES * v))) for v in vectors})
    next_r = b.add(r, I64(1))
    each.end([(r, next_r), (total, b.add(total, I64(width)))], again=b.icmp_signed("<", next_r, rows))
    b.ret(b.mul(iterations, pace))


class _Unit:
    """Writes the unit's instructions with a builder."""

    def __init__(self, b: ir.IRBuilder, prefix: str) -> None:
        self.b, self.prefix = b, prefix

    def __call__(self, name: str, *operands: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        self.b.call(declared(self.b.module, self.prefix + name, kind), operands)

    def pointer(self, address: ir.Value) -> ir.Value:
        return self.b.inttoptr(address, I8.as_pointer())

    def memory(self, size: int) -> ir.Value:
        """Return the address of as many bytes on the stack."""
        room = self.b.alloca(ir.ArrayType(I8, size))
        room.align = CACHE_LINE
        return self.b.ptrtoint(room, I64)

    def load(self, register: int, address: ir.Value, stride: ir.Value) -> None:
        self("tileloadd64", I8(register), self.pointer(address), stride)

    def configure(self, rows: ir.Value) -> None:
        """Give the tiles of x and of sums so many rows, that of w all of them."""
        b, config = self.b, self.memory(64)

        def put(at: int, value: ir.Value) -> None:
            b.store(value, b.inttoptr(b.add(config, I64(at)), value.type.as_pointer())).align = 1

        for at in range(0, 64, 8):
            put(at, I64(0))
        put(0, I8(PALETTE))
        for register in range(W + 1):
            put(COLUMNS_AT + 2 * register, I16(ROW_BYTES))
            put(ROWS_AT + register, I8(ROWS) if register == W else b.trunc(rows, I8))
        self("ldtilecfg", self.pointer(config))
