"""The inner loop of products, as LLVM instructions: a tile's function, for each shape and type of weights.

engine/backends/cpu/gemm.py has a picture of a tile, and the shapes that there are.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from llvmlite import ir

from engine.backends.cpu.simd import (
    BF16,
    CACHE_LINE,
    F32,
    I8,
    I16,
    I32,
    I64,
    ITEM,
    NEON,
    Loop,
    Vectors,
    declared,
)

K_UNROLL = 2  # loads of an iteration, in order: of an inner step each, or of as many as lie together
# Of weights that are multiplied several inner steps at a time: two in bfloat16, or four bytes.
PAIR, QUAD = ir.ArrayType(BF16, 2), ir.ArrayType(I8, 4)
TILED = ir.ArrayType(PAIR, 16)  # or in pairs, of a matrix unit: engine/backends/cpu/matrix_tile.py
NAMES = {PAIR: "pair", QUAD: "quad", TILED: "tiled"}
ZERO_BYTE = 128  # what a weight of 0 is in a QUAD: the instruction wants one factor unsigned
X_ITEMS = {PAIR: 2, TILED: 2, QUAD: 1}  # bytes of a number of x, where it is no float32
# Rows that a row of x is in memory: two for a QUAD, HIGH_STEP times the one and the other.
X_PARTS, HIGH_STEP = {QUAD: 2}, 128


class Tile(NamedTuple):
    """The shape of a tile, in registers.

    A sum is one chain of multiply-adds, or two, one for each load of an iteration: a few chains by
    themselves would wait for their own results.
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
        return "_".join(map(str, ("tile", *self, NAMES.get(number, number))))


class TileArguments(NamedTuple):
    """Arguments of a tile's function, all int64: addresses, bytes from one row to the next, and sizes.

    x is float32; bfloat16 where the weights are a PAIR, and two rows of int8 a row where they are a QUAD.
    """

    x: ir.Value
    x_row: ir.Value
    w: ir.Value
    w_row: ir.Value
    size: ir.Value  # inner steps, an even number of them; of pairs, or of quads
    out: ir.Value
    out_row: ir.Value
    row_scales: ir.Value  # a number for each row, or 0: none
    row_starts: ir.Value  # of a QUAD: what the int32 sums of each row of int8 begin at
    scales: ir.Value  # a number for each output, or 0: none
    add: ir.Value  # 0: out is overwritten
    ahead: ir.Value  # where to prefetch from
    tiles: ir.Value  # that read these weights, this one included


SIGNATURE = ir.FunctionType(I64, [I64] * len(TileArguments._fields))


def emit_tile(function: ir.Function, tile: Tile, number: ir.Type) -> None:
    """Write the body of a tile's function, for weights of a type: float, i8, i16 (bfloat16), PAIR or QUAD.

    A function of TileArguments, it computes

        out[r, :] = (out[r, :] if add) + row_scales[r] * scales[:] * sum over k < size of x[r, k] * w[k, :]

    where all is float32 but the weights, and x of a PAIR or QUAD. Of a QUAD sums are of integers, one for
    each part of a row, and w[k, :] the bytes without a sign: row_starts[p] is -ZERO_BYTE * sum over k of
    x[p, k], which makes up for that. Meanwhile it prefetches the memory from `ahead` on, and returns how many
    bytes: as many as it reads divided by the number of `tiles` that read these weights, so that the next
    weights arrive at an even pace.
    """
    b, args = ir.IRBuilder(function.append_basic_block("entry")), TileArguments(*function.args)
    t = TileWriter(b, tile, number, args)
    iterations = b.udiv(args.size, I64(K_UNROLL * t.steps))
    pace, starts = t.prefetch_pace(), t.starts()
    loop = Loop(b)
    i, x_k, w_k, line = (loop.carry(start) for start in (I64(0), args.x, args.w, args.ahead))
    carried_sums = {key: loop.carry(start) for key, start in starts.items()}
    sums = dict(carried_sums)
    for turn in range(K_UNROLL):
        w = b.add(w_k, b.mul(I64(turn), t.bytes_of_steps(args.w_row)))
        # Opaque, or a row's numbers of both would be loaded together, and wait in registers that are wanted.
        x = t.opaque(b.add(x_k, I64(turn * t.steps * t.x_item)))
        t.multiply(turn, x, [w], sums)
    t.prefetch_share(line)
    next_i, next_x = b.add(i, I64(1)), b.add(x_k, I64(K_UNROLL * t.steps * t.x_item))
    next_w = b.add(w_k, b.mul(t.bytes_of_steps(args.w_row), I64(K_UNROLL)))
    following = [(i, next_i), (x_k, next_x), (w_k, next_w), (line, b.add(line, pace))]
    following += [(carried_sums[key], sums[key]) for key in sums]
    loop.end(following, again=b.icmp_signed("<", next_i, iterations))
    t.scale_add_and_store(sums)
    b.ret(b.mul(iterations, pace))


class TileWriter(Vectors):
    """Writes the pieces of a tile's function: see `emit_tile` for their order."""

    def __init__(self, builder: ir.IRBuilder, tile: Tile, number: ir.Type, args: TileArguments) -> None:
        super().__init__(builder, tile.lanes)
        self.tile, self.number, self.args = tile, number, args
        self._item, self.x_item = {F32: ITEM, I8: 1, QUAD: 1}.get(number, 2), X_ITEMS.get(number, ITEM)
        self.steps = {I16: 2, PAIR: 2, QUAD: 4}.get(number, 1)  # inner steps that are loaded at a time
        self._outputs = [(r, v) for r in range(tile.rows) for v in range(tile.vectors)]
        self._parts = X_PARTS.get(number, 1)

    def starts(self) -> dict[tuple[int, int, int], ir.Value]:
        """Return what each sum, by (chain, row of x, vector), begins at."""
        chains, rows, vectors = range(self.tile.chains), range(self._x_rows), range(self.tile.vectors)
        if self.number != QUAD:
            return dict.fromkeys(product(chains, rows, vectors), self.constant(0.0))
        none = ir.Constant(self._ints, [0] * self.count)
        places = (self.b.add(self.args.row_starts, I64(ITEM * p)) for p in rows)
        first = [self.b.bitcast(self.broadcast_from(place), self._ints) for place in places]
        return {(chain, p, v): none if chain else first[p] for chain, p, v in product(chains, rows, vectors)}

    @property
    def _x_rows(self) -> int:
        return self._parts * self.tile.rows

    def bytes_of_steps(self, one: ir.Value) -> ir.Value:
        """Return how many bytes it is from what is loaded at a time to the next, `one` for an inner step."""
        return self.b.mul(one, I64(self.steps))

    def multiply(
        self, turn: int, x: ir.Value, parts: list[ir.Value], sums: dict[tuple[int, int, int], ir.Value]
    ) -> None:
        """Add the products of what is loaded at a time to the sums.

        Args:
            turn: which load of an iteration this is; chains of sums take turns.
            x: address of the first row's numbers.
            parts: addresses of the weights, each of an equal share of the tile's width.
        """
        for step, w_vectors in enumerate(self._load_weights(parts)):
            for p, address in enumerate(self._row_addresses(self.b.add(x, I64(self.x_item * step)))):
                x_rk = self._broadcast_x(address)
                for v, w in enumerate(w_vectors):
                    key = turn % self.tile.chains, p, v
                    sums[key] = self._multiply_add(x_rk, w, sums[key])

    def _load_weights(self, parts: list[ir.Value]) -> list[list[ir.Value]]:
        """Load the vectors of w[k, :], and of w[k + 1, :] where they lie in pairs, as float32; or pairs."""
        stored = {F32: self.kind, I8: ir.VectorType(I8, self.count)}
        kind = stored.get(self.number, self._ints)
        size, align = self._item * self.steps * self.count, 1 if self.number == I8 else ITEM
        offsets = [I64(size * v) for v in range(self.tile.vectors // len(parts))]
        places = [self.b.add(address, offset) for address in parts for offset in offsets]
        vectors = [self._as_numbers(self.load(place, kind, align)) for place in places]
        return [list(step) for step in zip(*vectors, strict=True)]

    def _as_numbers(self, bits: ir.Value) -> list[ir.Value]:
        """Return what was loaded as vectors to be multiplied, one an inner step."""
        if self.number in (F32, QUAD):
            return [bits]
        if self.number == PAIR:
            return [self.b.bitcast(bits, self._pairs)]
        if self.number == I8:
            return [self.b.sitofp(bits, self.kind)]
        by, upper = (ir.Constant(bits.type, [number] * self.count) for number in (16, 0xFFFF0000))
        return [self.b.bitcast(half, self.kind) for half in (self.b.shl(bits, by), self.b.and_(bits, upper))]

    def _row_addresses(self, first: ir.Value) -> Iterator[ir.Value]:
        """Yield the address of each row's number, from that of the first row on.

        LLVM would keep the address of every row for both loads. x86 has 16 registers for them: it would run
        out, order the loop for their sake, and put sums on the stack. So on x86 it can't see how an address
        comes about, and three rows share one: an instruction adds x_row to it, once or twice, as it reads.
        """
        b, args, rows = self.b, self.args, self._x_rows
        if self.count == NEON.lanes:
            yield from (b.add(first, b.mul(args.x_row, I64(r))) for r in range(rows))
            return
        for r in range(0, rows, 3):
            if r > 0:
                first = b.add(first, b.mul(args.x_row, I64(3)))
            first = self.opaque(first)
            for more in range(min(3, rows - r)):
                yield b.add(first, b.mul(args.x_row, I64(more)))

    def opaque(self, value: ir.Value) -> ir.Value:
        """Return a value of which LLVM does not know that it is this one."""
        return self.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], False)

    def broadcast_from(self, address: ir.Value) -> ir.Value:
        return self.broadcast(self.load(address, F32))

    def _broadcast_x(self, address: ir.Value) -> ir.Value:
        """Load a row's number, or its two of a pair or four of a quad, for each output."""
        x = self.broadcast_from(address)
        return self.b.bitcast(x, {PAIR: self._pairs, QUAD: self._ints}.get(self.number, self.kind))

    def _multiply_add(self, x: ir.Value, w: ir.Value, total: ir.Value) -> ir.Value:
        if self.number == PAIR:
            return self._x86("avx512bf16.dpbf16ps", total, x, w)
        if self.number == QUAD:  # the second factor is the one with a sign
            return self._x86("avx512.vpdpbusd", total, w, x)
        return self.call("fma", x, w, total)

    def _x86(self, name: str, *values: ir.Value) -> ir.Value:
        """Call LLVM's name for an instruction of x86 that gives a vector of the kind of its first operand."""
        kind = ir.FunctionType(values[0].type, [value.type for value in values])
        return self.b.call(declared(self.b.module, f"llvm.x86.{name}.{32 * self.count}", kind), values)

    @property
    def _pairs(self) -> ir.VectorType:
        return ir.VectorType(BF16, 2 * self.count)

    @property
    def _ints(self) -> ir.VectorType:
        return ir.VectorType(I32, self.count)

    def _bytes_read(self) -> int:
        """Return how many bytes of weights an iteration reads."""
        return K_UNROLL * self.steps * self.tile.width * self._item

    def prefetch_pace(self) -> ir.Value:
        """Return how many bytes further each iteration prefetches."""
        return self.b.udiv(I64(self._bytes_read()), self.args.tiles)

    def prefetch_share(self, address: ir.Value) -> None:
        """Ask for an iteration's share, line by line, from `address` on."""
        self.prefetch_lines(address, self._bytes_read())

    def prefetch_lines(self, address: ir.Value, size: int) -> None:
        """Ask for so many bytes."""
        for offset in range(0, size, CACHE_LINE):
            self.prefetch(self.b.add(address, I64(offset)))

    def scale_add_and_store(self, sums: dict[tuple[int, int, int], ir.Value]) -> None:
        """Put the chains together, scale them, add what was there, and store: each where it is asked for."""
        b, args = self.b, self.args
        totals = {(r, v): self._total(sums, r, v) for r, v in self._outputs}

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

    def _total(self, sums: dict[tuple[int, int, int], ir.Value], r: int, v: int) -> ir.Value:
        """Put the chains of a row and vector together, and its parts."""
        b, chains = self.b, range(self.tile.chains)
        if self.number != QUAD:
            return functools.reduce(b.fadd, [sums[chain, r, v] for chain in chains])
        both = ([sums[chain, 2 * r + part, v] for chain in chains] for part in (0, 1))
        high, low = (b.sitofp(functools.reduce(b.add, part), self.kind) for part in both)
        return self.call("fma", high, self.constant(HIGH_STEP), low)

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
