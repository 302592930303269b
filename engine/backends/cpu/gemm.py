"""A product of a few rows by a few vectors of outputs, its sums in registers: what every product here is made
of.

That is the inner loop of every good matrix product (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008). It is written as LLVM's vectors, so that the registers are used as meant on any
processor, and every sum is a chain of fused multiply-adds in the same order however many rows there are: a
row's result does not depend on its neighbours, to the last bit.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import extending, types
from numba.core.registry import cpu_target

from engine.backends.cpu.jit import part

intrinsic: Any = extending.intrinsic  # its type does not say that what it makes lacks the first argument


class Registers(NamedTuple):
    """A processor's vector registers."""

    lanes: int  # float32 numbers in one of them
    total: int


class Tile(NamedTuple):
    """The shape of a tile, in registers.

    A sum is one chain of multiply-adds, or two, the second for the second half of the inner steps: a few
    chains by themselves would wait for their own results.
    """

    lanes: int  # float32 numbers of a vector
    rows: int
    vectors: int
    chains: int

    @property
    def width(self) -> int:
        """Outputs of a row."""
        return self.vectors * self.lanes

    def name(self, number: ir.Type) -> str:
        """The name of this tile's function, for weights of a type."""
        return "_".join(map(str, ("tile", *self, number)))


AVX2, AVX512, NEON = Registers(8, 16), Registers(16, 32), Registers(4, 32)
# Sums, the weights of an inner step and the numbers of a row or two share the registers. tests/test_gemm.py
# reads what LLVM makes of each tile, for several processors, and finds none of them on the stack.
WIDE_TILES = {AVX2: Tile(8, 4, 3, 1), AVX512: Tile(16, 8, 3, 1), NEON: Tile(4, 7, 3, 1)}
NARROW_TILES = {AVX2: Tile(8, 3, 2, 2), AVX512: Tile(16, 8, 1, 2), NEON: Tile(4, 3, 4, 2)}

INTEL = platform.machine() in ("x86_64", "AMD64")
FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")  # of what Numba compiles for
if INTEL and "+fma" not in FEATURES:
    raise ImportError("this processor has no fused multiply-add")
REGISTERS = AVX512 if "+avx512f" in FEATURES else AVX2 if INTEL else NEON
LANES = REGISTERS.lanes
WIDE_TILE, NARROW_TILE = WIDE_TILES[REGISTERS], NARROW_TILES[REGISTERS]
WIDE = WIDE_TILE.width  # outputs of a tile of a weight
NARROW = NARROW_TILE.width  # outputs of a tile of keys or values, 16
AT_ONCE = 2  # inner steps of a turn of the loop
# The inner steps are in as many parts, and a turn takes one of each: memory is read faster in two places than
# in one.
LINE = 64  # bytes that the memory gives at once
# Up to so many rows, by lanes, a tile of float32 weights waits for memory, and to prefetch more than a line a
# turn only gets in the way of what the processor itself reads ahead.
FEW = {4: 1, 8: 1, 16: 4}
ITEM = 4  # bytes of a float32

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
SIGNATURE = ir.FunctionType(_I64, [_I64] * 12)  # of a tile's function


def write(function: ir.Function, tile: Tile, number: ir.Type) -> None:
    """Write the body of a tile's function, for weights of a type, float or i8.

    Its arguments are x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, tiles. It is

        out[r, :] = (out[r, :] if add) + row_scales[r] * scales[:] * sum over k < size of x[r, k] * w[k, :]

    without those whose address is 0. Weights aside, all is float32, given by address. Rows are so many bytes
    apart; size is even. Meanwhile it prefetches what lies from `ahead` on, and returns how many bytes: as
    many as it reads divided by the number of `tiles` that read these weights, so that what is read next
    arrives at an even pace.
    """
    lanes, rows, vectors, chains = tile
    vec = ir.VectorType(_F32, lanes)
    x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, tiles = function.args
    entry, loop, done = map(function.append_basic_block, ("entry", "loop", "done"))
    b, wanted = ir.IRBuilder(entry), [(r, v) for r in range(rows) for v in range(vectors)]
    fma = declared(function.module, f"llvm.fma.v{lanes}f32", ir.FunctionType(vec, [vec] * 3))
    hint = ir.FunctionType(ir.VoidType(), [_I32.as_pointer(), _I32, _I32, _I32])
    prefetch = declared(function.module, "llvm.prefetch.p0", hint)

    def at(address: ir.Value, kind: ir.Type) -> ir.Value:
        return b.inttoptr(address, kind.as_pointer())

    def load(address: ir.Value, kind: ir.Type) -> ir.Value:
        value = b.load(at(address, kind))
        value.align = 4
        return value

    def weight(address: ir.Value) -> ir.Value:
        if number == _F32:
            return load(address, vec)
        few = b.load(at(address, ir.VectorType(number, lanes)))
        few.align = 1
        return b.sitofp(few, vec)

    def spread(address: ir.Value) -> ir.Value:
        first = b.insert_element(ir.Constant(vec, ir.Undefined), load(address, _F32), _I32(0))
        return b.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))

    def row_addresses(past: ir.Value) -> Iterator[ir.Value]:
        """Yield the address of each row's number, `past` bytes from where the row begins.

        LLVM would keep the address of every row in both halves of the inner steps. x86 has 16 registers for
        them: it would run out, order the loop for their sake, and put sums on the stack. So on x86 it can't
        see how an address comes about, and three rows share one: an instruction adds x_row to it, once or
        twice, as it reads.
        """
        if lanes == NEON.lanes:
            yield from (b.add(b.add(x, b.mul(x_row, _I64(r))), past) for r in range(rows))
            return
        first = b.add(x, past)
        for r in range(0, rows, 3):
            if r > 0:
                first = b.add(first, b.mul(x_row, _I64(3)))
            first = b.asm(ir.FunctionType(_I64, [_I64]), "", "=r,0", [first], False)
            for more in range(min(3, rows - r)):
                yield b.add(first, b.mul(x_row, _I64(more)))

    def place(r: int, v: int) -> ir.Value:
        return b.add(out, b.add(b.mul(out_row, _I64(r)), _I64(ITEM * lanes * v)))

    item = ITEM if number == _F32 else 1
    read = AT_ONCE * tile.width * item  # bytes of a turn
    turns = b.udiv(size, _I64(AT_ONCE))
    waits = number == _F32 and chains == 1 and rows <= FEW[lanes]
    pace = _I64(LINE) if waits else b.udiv(_I64(read), tiles)  # bytes to prefetch in a turn
    b.branch(loop)
    b.position_at_end(loop)
    k, w_k, line = (b.phi(_I64) for _ in range(3))
    for phi, start in ((k, _I64(0)), (w_k, w), (line, ahead)):
        phi.add_incoming(start, entry)
    begun = {(chain, r, v): b.phi(vec) for chain in range(chains) for r, v in wanted}
    for phi in begun.values():
        phi.add_incoming(ir.Constant(vec, [0.0] * lanes), entry)
    sums = dict(begun)
    for turn in range(AT_ONCE):
        here = b.mul(turns, _I64(turn))
        w_here = b.add(w_k, b.mul(here, w_row))
        w_vs = [weight(b.add(w_here, _I64(item * lanes * v))) for v in range(vectors)]
        for r, address in enumerate(row_addresses(b.mul(b.add(k, here), _I64(ITEM)))):
            x_rk = spread(address)
            for v in range(vectors):
                chain = turn % chains
                sums[chain, r, v] = b.call(fma, [x_rk, w_vs[v], sums[chain, r, v]])
    for offset in range(0, LINE if waits else read, LINE):  # to be read, into the second cache, data
        b.call(prefetch, [at(b.add(line, _I64(offset)), _I32), _I32(0), _I32(2), _I32(1)])
    next_k = b.add(k, _I64(1))
    for phi, end in ((k, next_k), (w_k, b.add(w_k, w_row)), (line, b.add(line, pace))):
        phi.add_incoming(end, loop)
    for chain_r_v, phi in begun.items():
        phi.add_incoming(sums[chain_r_v], loop)
    b.cbranch(b.icmp_signed("<", next_k, turns), loop, done)
    b.position_at_end(done)
    totals = {(r, v): functools.reduce(b.fadd, [sums[c, r, v] for c in range(chains)]) for r, v in wanted}

    def scaled(r: int, v: int) -> ir.Value:
        return b.fmul(totals[r, v], spread(b.add(row_scales, _I64(ITEM * r))))

    def weighed(r: int, v: int) -> ir.Value:
        return b.fmul(totals[r, v], load(b.add(scales, _I64(ITEM * lanes * v)), vec))

    def added(r: int, v: int) -> ir.Value:
        return b.fadd(totals[r, v], load(place(r, v), vec))

    for given, change in ((row_scales, scaled), (scales, weighed), (add, added)):
        before = b.block
        with b.if_then(b.icmp_signed("!=", given, _I64(0))):
            changed = {(r, v): change(r, v) for r, v in wanted}
            inside = b.block
        for key in wanted:
            phi = b.phi(vec)
            phi.add_incoming(totals[key], before)
            phi.add_incoming(changed[key], inside)
            totals[key] = phi
    for r, v in wanted:
        b.store(totals[r, v], at(place(r, v), vec)).align = ITEM
    b.ret(b.mul(turns, pace))


def declared(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    return module.globals[name] if name in module.globals else ir.Function(module, kind, name)


def _tiles(most: Tile) -> Any:
    """A function of (rows, dtype of w, a tile's arguments) -> bytes prefetched, for 1 to `most.rows` rows."""

    @intrinsic
    def tile(
        typing, rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, tiles
    ):  # fmt: skip
        def call(context, builder, signature, args):
            number = _F32 if kind.dtype is types.float32 else _I8
            never, after = (builder.append_basic_block(name) for name in ("never", "after"))
            switch = builder.switch(args[0], never)
            builder.position_at_end(never)
            builder.unreachable()
            builder.position_at_end(after)
            prefetched = builder.phi(_I64)
            for count in range(1, most.rows + 1):
                shape = most._replace(rows=count)
                name = shape.name(number)
                fresh = name not in builder.module.globals
                function = declared(builder.module, name, SIGNATURE)
                if fresh:
                    function.linkage = "internal"
                    function.attributes.add("noinline")
                    write(function, shape, number)
                block = builder.append_basic_block(name)
                switch.add_case(count, block)
                builder.position_at_end(block)
                prefetched.add_incoming(builder.call(function, args[2:]), block)
                builder.branch(after)
            builder.position_at_end(after)
            return prefetched

        return types.int64(types.int64, kind, *[types.int64] * 12), call

    return tile


def _by_rows(most: Tile) -> Any:
    """A function of (rows, dtype of w, a tile's arguments but the last two, ahead, end) -> ahead.

    It divides rows evenly among as few tiles as possible: a tile of one row reads as many weights as one of
    many. Each tile prefetches on from where the one before it stopped, until `end`.
    """
    tile, height = _tiles(most), most.rows

    @part()
    def multiply(rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, end):
        scaled = ITEM if row_scales != 0 else 0
        tiles = (rows + height - 1) // height
        fewest = rows // max(tiles, 1)
        more = rows - fewest * tiles  # tiles that have one more
        for index in range(tiles):
            count = fewest + 1 if index < more else fewest
            line = ahead if ahead < end else w  # what is there already costs nothing
            ahead += tile(
                count, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line, tiles
            )  # fmt: skip
            x, out, row_scales = x + count * x_row, out + count * out_row, row_scales + count * scaled
        return ahead

    return multiply


multiply_wide = _by_rows(WIDE_TILE)
multiply_narrow = _by_rows(NARROW_TILE)
