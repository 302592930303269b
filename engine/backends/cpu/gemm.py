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
one is these bits shifted by 16, the other their upper half, for a bfloat16 is the upper half of a float32.

This is the inner loop of every good matrix product (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008). Every sum is a chain of fused multiply-adds in the same order however many rows
there are: a row's result does not depend on its neighbours, to the last bit.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from engine.backends.cpu.jit import part
from engine.backends.cpu.simd import (
    AVX2,
    AVX512,
    CACHE_LINE,
    F32,
    I8,
    I16,
    I32,
    I64,
    ITEM,
    NEON,
    REGISTERS,
    Loop,
    Vectors,
    declared,
    intrinsic,
)


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
        """Return the name of this tile's function, for weights of a type."""
        return "_".join(map(str, ("tile", *self, number)))


# Sums, the weights of an inner step and the numbers of a row or two share the registers. tests/test_gemm.py
# reads the machine code of each tile, for several processors, and finds none of them on the stack.
WIDE_TILES = {AVX2: Tile(8, 4, 3, 1), AVX512: Tile(16, 8, 3, 1), NEON: Tile(4, 7, 3, 1)}
NARROW_TILES = {AVX2: Tile(8, 3, 2, 2), AVX512: Tile(16, 8, 1, 2), NEON: Tile(4, 3, 4, 2)}
# Pairs of inner steps leave registers for fewer sums.
PAIR_TILES = {AVX2: Tile(8, 3, 3, 1), AVX512: Tile(16, 6, 3, 1), NEON: Tile(4, 6, 3, 1)}
WIDE_TILE, NARROW_TILE, PAIR_TILE = WIDE_TILES[REGISTERS], NARROW_TILES[REGISTERS], PAIR_TILES[REGISTERS]
WIDE = WIDE_TILE.width  # outputs of a tile of a weight: a panel's
NARROW = NARROW_TILE.width  # outputs of a tile of keys or values, 16
# The inner steps are in as many streams, and an iteration takes one step of each: memory is read faster in
# two places than in one.
K_STREAMS = 2
# Of weights, as they are stored: float32, int8, or bfloat16 as 16 bits that NumPy has a name for.
NUMBERS = {types.float32: F32, types.int8: I8, types.uint16: I16}
# Up to so many rows, by lanes, a tile of float32 weights waits for memory, and to prefetch more than a line
# an iteration only gets in the way of what the processor itself reads ahead.
MAX_MEMORY_BOUND_ROWS = {4: 1, 8: 1, 16: 4}


class TileArguments(NamedTuple):
    """Arguments of a tile's function, all int64: addresses, bytes from one row to the next, and sizes."""

    x: ir.Value
    x_row: ir.Value
    w: ir.Value
    w_row: ir.Value
    size: ir.Value  # inner steps, an even number of them; of pairs in bfloat16
    out: ir.Value
    out_row: ir.Value
    row_scales: ir.Value  # a number for each row, or 0: none
    scales: ir.Value  # a number for each output, or 0: none
    add: ir.Value  # 0: out is overwritten
    ahead: ir.Value  # where to prefetch from
    tiles: ir.Value  # that read these weights, this one included


SIGNATURE = ir.FunctionType(I64, [I64] * len(TileArguments._fields))


def emit_tile(function: ir.Function, tile: Tile, number: ir.Type) -> None:
    """Write the body of a tile's function, for weights of a type, float, i8, or i16 that are bfloat16.

    A function of TileArguments, it computes

        out[r, :] = (out[r, :] if add) + row_scales[r] * scales[:] * sum over k < size of x[r, k] * w[k, :]

    where all is float32, weights aside. Meanwhile it prefetches the memory from `ahead` on, and returns how
    many bytes: as many as it reads divided by the number of `tiles` that read these weights, so that the next
    weights arrive at an even pace.
    """
    t = _TileWriter(function, tile, number)
    b, args = t.b, t.args
    iterations = b.udiv(args.size, I64(K_STREAMS * t.steps))
    pace = t.prefetch_pace()
    loop = Loop(b)
    i, w_k, line = loop.carry(I64(0)), loop.carry(args.w), loop.carry(args.ahead)
    carried_sums = {key: loop.carry(t.constant(0.0)) for key in t.sum_keys()}
    sums = dict(carried_sums)
    for stream in range(K_STREAMS):
        first_i = b.mul(iterations, I64(stream))
        steps = t.load_weights(b.add(w_k, b.mul(first_i, t.bytes_of_steps(args.w_row))))
        x_k = b.mul(b.add(i, first_i), t.bytes_of_steps(I64(ITEM)))
        for step, w_vectors in enumerate(steps):
            for r, address in enumerate(t.row_addresses(b.add(x_k, I64(ITEM * step)))):
                x_rk = t.broadcast_from(address)
                for v in range(tile.vectors):
                    key = stream % tile.chains, r, v
                    sums[key] = t.multiply_add(x_rk, w_vectors[v], sums[key])
    t.prefetch(line)
    next_i, next_w = b.add(i, I64(1)), b.add(w_k, t.bytes_of_steps(args.w_row))
    following = [(i, next_i), (w_k, next_w), (line, b.add(line, pace))]
    following += [(carried_sums[key], sums[key]) for key in sums]
    loop.end(following, again=b.icmp_signed("<", next_i, iterations))
    t.scale_add_and_store(sums)
    b.ret(b.mul(iterations, pace))


class _TileWriter(Vectors):
    """Writes the pieces of a tile's function: see `emit_tile` for their order."""

    def __init__(self, function: ir.Function, tile: Tile, number: ir.Type) -> None:
        super().__init__(ir.IRBuilder(function.append_basic_block("entry")), tile.lanes)
        self.tile, self.number, self.args = tile, number, TileArguments(*function.args)
        self._item = {F32: ITEM, I8: 1, I16: 2}[number]
        self.steps = 2 if number == I16 else 1  # inner steps that are loaded at a time
        self._outputs = [(r, v) for r in range(tile.rows) for v in range(tile.vectors)]
        few_rows = tile.rows <= MAX_MEMORY_BOUND_ROWS[tile.lanes]
        self._memory_bound = number == F32 and tile.chains == 1 and few_rows

    def sum_keys(self) -> list[tuple[int, int, int]]:
        """Return (chain, row, vector) of each sum."""
        return [(chain, r, v) for chain in range(self.tile.chains) for r, v in self._outputs]

    def bytes_of_steps(self, one: ir.Value) -> ir.Value:
        """Return how many bytes it is from what is loaded at a time to the next, `one` for an inner step."""
        return self.b.mul(one, I64(self.steps))

    def load_weights(self, address: ir.Value) -> list[list[ir.Value]]:
        """Load the vectors of w[k, :], and of w[k + 1, :] where they lie in pairs, as float32."""
        stored = {F32: self.kind, I8: ir.VectorType(I8, self.count), I16: ir.VectorType(I32, self.count)}
        size, align = self._item * self.steps * self.count, 1 if self.number == I8 else ITEM
        steps: list[list[ir.Value]] = [[] for _ in range(self.steps)]
        for v in range(self.tile.vectors):
            bits = self.load(self.b.add(address, I64(size * v)), stored[self.number], align)
            for step, vector in zip(steps, self._as_float32(bits), strict=True):
                step.append(vector)
        return steps

    def _as_float32(self, bits: ir.Value) -> list[ir.Value]:
        """Return the vectors that were loaded."""
        if self.number == F32:
            return [bits]
        if self.number == I8:
            return [self.b.sitofp(bits, self.kind)]
        by, upper = (ir.Constant(bits.type, [number] * self.count) for number in (16, 0xFFFF0000))
        return [self.b.bitcast(half, self.kind) for half in (self.b.shl(bits, by), self.b.and_(bits, upper))]

    def row_addresses(self, past: ir.Value) -> Iterator[ir.Value]:
        """Yield the address of each row's number, `past` bytes from the beginning of the row.

        LLVM would keep the address of every row in both streams. x86 has 16 registers for them: it would run
        out, order the loop for their sake, and put sums on the stack. So on x86 it can't see how an address
        comes about, and three rows share one: an instruction adds x_row to it, once or twice, as it reads.
        """
        b, args, rows = self.b, self.args, self.tile.rows
        if self.count == NEON.lanes:
            yield from (b.add(b.add(args.x, b.mul(args.x_row, I64(r))), past) for r in range(rows))
            return
        first = b.add(args.x, past)
        for r in range(0, rows, 3):
            if r > 0:
                first = b.add(first, b.mul(args.x_row, I64(3)))
            first = b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [first], False)
            for more in range(min(3, rows - r)):
                yield b.add(first, b.mul(args.x_row, I64(more)))

    def broadcast_from(self, address: ir.Value) -> ir.Value:
        return self.broadcast(self.load(address, F32))

    def multiply_add(self, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
        return self.call("fma", x, w, total)

    def _bytes_read(self) -> int:
        """Return how many bytes of weights an iteration reads."""
        return K_STREAMS * self.steps * self.tile.width * self._item

    def prefetch_pace(self) -> ir.Value:
        """Return how many bytes further each iteration prefetches."""
        if self._memory_bound:
            return I64(CACHE_LINE)
        return self.b.udiv(I64(self._bytes_read()), self.args.tiles)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for an iteration's share, line by line, from `address` on."""
        hint = ir.FunctionType(ir.VoidType(), [I32.as_pointer(), I32, I32, I32])
        prefetch = declared(self.b.module, "llvm.prefetch.p0", hint)
        read, second_cache, data = I32(0), I32(2), I32(1)
        for offset in range(0, CACHE_LINE if self._memory_bound else self._bytes_read(), CACHE_LINE):
            line = self.pointer(self.b.add(address, I64(offset)), I32)
            self.b.call(prefetch, [line, read, second_cache, data])

    def scale_add_and_store(self, sums: dict[tuple[int, int, int], ir.Value]) -> None:
        """Put the chains together, scale them, add what was there, and store: each where it is asked for."""
        b, args = self.b, self.args
        totals = {
            (r, v): functools.reduce(b.fadd, [sums[chain, r, v] for chain in range(self.tile.chains)])
            for r, v in self._outputs
        }

        def scaled_by_row(r: int, v: int) -> ir.Value:
            return b.fmul(totals[r, v], self.broadcast_from(b.add(args.row_scales, I64(ITEM * r))))

        def scaled_by_output(r: int, v: int) -> ir.Value:
            return b.fmul(totals[r, v], self.load(b.add(args.scales, I64(ITEM * self.count * v))))

        def added(r: int, v: int) -> ir.Value:
            return b.fadd(totals[r, v], self.load(self._place(r, v)))

        for given, change in (
            (args.row_scales, scaled_by_row),
            (args.scales, scaled_by_output),
            (args.add, added),
        ):
            totals = self._changed_if(given, totals, change)
        for r, v in self._outputs:
            self.store(totals[r, v], self._place(r, v))

    def _changed_if(
        self, given: ir.Value, totals: dict[tuple[int, int], ir.Value], change: Callable[[int, int], ir.Value]
    ) -> dict[tuple[int, int], ir.Value]:
        """Return the totals after a change if `given` is not 0, else as they are."""
        before, merged = self.b.block, {}
        with self.b.if_then(self.b.icmp_signed("!=", given, I64(0))):
            changed = {key: change(*key) for key in self._outputs}
            inside = self.b.block
        for key in self._outputs:
            merged[key] = self.b.phi(self.kind)
            merged[key].add_incoming(totals[key], before)
            merged[key].add_incoming(changed[key], inside)
        return merged

    def _place(self, r: int, v: int) -> ir.Value:
        """Return the address of a vector of outputs."""
        offset = self.b.add(self.b.mul(self.args.out_row, I64(r)), I64(ITEM * self.count * v))
        return self.b.add(self.args.out, offset)


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


def _call_by_rows(tallest: Tile, tallest_of_pairs: Tile) -> Any:
    """Return a function of (rows, dtype of w, TileArguments) -> bytes prefetched, for 1 to a tallest tile's
    rows."""

    @intrinsic
    def tile(
        typing, rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, tiles
    ):  # fmt: skip
        def call(context, builder, signature, args):
            number = NUMBERS[kind.dtype]
            most = tallest_of_pairs if number == I16 else tallest
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


def _multiply(tallest: Tile, tallest_of_pairs: Tile) -> Any:
    """Return a function of (rows, dtype of w, TileArguments but the last two, ahead, end) -> ahead.

    It divides rows evenly among as few tiles as possible: a tile of one row reads as many weights as one of
    many. Each tile prefetches on from where the one before it stopped, until `end`.
    """
    tile = _call_by_rows(tallest, tallest_of_pairs)

    @intrinsic
    def most_rows(typing, kind):
        def call(context, builder, signature, args):
            return I64((tallest_of_pairs if NUMBERS[kind.dtype] == I16 else tallest).rows)

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


multiply_wide = _multiply(WIDE_TILE, PAIR_TILE)
multiply_narrow = _multiply(NARROW_TILE, NARROW_TILE)
