"""A product of a few rows by a few vectors of outputs, its sums in registers: what every product here is made of.

That is the inner loop of every good matrix product (Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008). It is written as LLVM's vectors, so that the registers are used as meant on any processor, and
every sum is a chain of fused multiply-adds in the same order however many rows there are: a row's result does not
depend on its neighbours, to the last bit.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
import platform
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import extending, types

from engine.cpu.compiled import part

intrinsic: Any = extending.intrinsic  # its type does not say that what it makes lacks the first argument
FEATURES = llvmlite.binding.get_host_cpu_features()
INTEL = platform.machine() in ("x86_64", "AMD64")
if INTEL and not FEATURES.get("fma"):
    raise ImportError("this processor has no fused multiply-add")
LANES = 16 if FEATURES.get("avx512f") else 8 if INTEL else 4  # float32 of a vector register
ROWS = 4 if LANES == 8 else 8  # of a tile: with VECTORS, sums for three quarters of the registers
VECTORS = 3  # of a tile of a weight
WIDE = VECTORS * LANES  # outputs of a tile of a weight
NARROW = 16  # outputs of a tile of keys or values
AT_ONCE = 2  # inner steps of a turn of the loop; for each turn, a line of what is read next is asked for a chain
# The inner steps are in as many parts, and a turn takes one of each: memory is read faster in two places than in one.
LINE = 64  # bytes that the memory gives at once
ITEM = 4  # bytes of a float32

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _tile(rows: int, vectors: int, chains: int) -> Any:
    """A function: (kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead) -> none.

    out[r, :] = (out[r, :] if add) + row_scales[r] * scales[:] * sum over k < size of x[r, k] * w[k, :], without those
    whose address is 0. `kind` is the dtype of w, float32 or int8; all else is float32, given by address. Rows are so
    many bytes apart; size is even. Meanwhile asks for what lies from `ahead` on. There is one chain of each sum, or
    another for the second half of k: few sums by themselves would wait for each other.
    """
    vec = ir.VectorType(_F32, LANES)

    @intrinsic
    def tile(typing, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead):
        def call(context, builder, signature, args):
            number = _F32 if kind.dtype is types.float32 else ir.IntType(8)
            name = f"tile_{rows}_{vectors}_{chains}_{number}"
            fresh = name not in builder.module.globals
            function = declared(builder.module, name, ir.FunctionType(ir.VoidType(), [_I64] * 11))
            if fresh:
                function.linkage = "internal"
                function.attributes.add("noinline")
                body(function, number)
            builder.call(function, args[1:])
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 11), call

    def body(function: ir.Function, number: ir.Type) -> None:
        x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead = function.args
        entry, loop, done = map(function.append_basic_block, ("entry", "loop", "done"))
        b, wanted = ir.IRBuilder(entry), [(r, v) for r in range(rows) for v in range(vectors)]
        fma = declared(function.module, f"llvm.fma.v{LANES}f32", ir.FunctionType(vec, [vec] * 3))
        hint = ir.FunctionType(ir.VoidType(), [_I32.as_pointer(), _I32, _I32, _I32])
        prefetch = declared(function.module, "llvm.prefetch.p0", hint)

        def at(address: ir.Value, kind: ir.Type) -> ir.Value:
            return b.inttoptr(address, kind.as_pointer())

        def load(address: ir.Value, kind: ir.Type) -> ir.Value:
            value = b.load(at(address, kind))
            value.align = 4
            return value

        def weight(address: ir.Value) -> ir.Value:
            if number is _F32:
                return load(address, vec)
            few = b.load(at(address, ir.VectorType(number, LANES)))
            few.align = 1
            return b.sitofp(few, vec)

        def spread(address: ir.Value) -> ir.Value:
            first = b.insert_element(ir.Constant(vec, ir.Undefined), load(address, _F32), _I32(0))
            return b.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

        item = ITEM if number is _F32 else 1
        xs = [b.add(x, b.mul(x_row, _I64(r))) for r in range(rows)]
        turns = b.udiv(size, _I64(AT_ONCE))
        b.branch(loop)
        b.position_at_end(loop)
        k, w_k, line = (b.phi(_I64) for _ in range(3))
        for phi, start in ((k, _I64(0)), (w_k, w), (line, ahead)):
            phi.add_incoming(start, entry)
        begun = {(chain, r, v): b.phi(vec) for chain in range(chains) for r, v in wanted}
        for phi in begun.values():
            phi.add_incoming(ir.Constant(vec, [0.0] * LANES), entry)
        sums = dict(begun)
        for turn in range(AT_ONCE):
            here = b.mul(turns, _I64(turn))
            w_here = b.add(w_k, b.mul(here, w_row))
            w_vs = [weight(b.add(w_here, _I64(item * LANES * v))) for v in range(vectors)]
            for r in range(rows):
                x_rk = spread(b.add(xs[r], b.mul(b.add(k, here), _I64(ITEM))))
                for v in range(vectors):
                    chain = turn % chains
                    sums[chain, r, v] = b.call(fma, [x_rk, w_vs[v], sums[chain, r, v]])
        for more in range(chains):  # to be read, into the second cache, data
            b.call(prefetch, [at(b.add(line, _I64(more * LINE)), _I32), _I32(0), _I32(2), _I32(1)])
        next_k = b.add(k, _I64(1))
        for phi, end in ((k, next_k), (w_k, b.add(w_k, w_row)), (line, b.add(line, _I64(chains * LINE)))):
            phi.add_incoming(end, loop)
        for chain_r_v, phi in begun.items():
            phi.add_incoming(sums[chain_r_v], loop)
        b.cbranch(b.icmp_signed("<", next_k, turns), loop, done)
        b.position_at_end(done)
        totals = {(r, v): functools.reduce(b.fadd, [sums[c, r, v] for c in range(chains)]) for r, v in wanted}

        def scaled(r: int, v: int) -> ir.Value:
            return b.fmul(totals[r, v], spread(b.add(row_scales, _I64(4 * r))))

        def weighed(r: int, v: int) -> ir.Value:
            return b.fmul(totals[r, v], load(b.add(scales, _I64(4 * LANES * v)), vec))

        def added(r: int, v: int) -> ir.Value:
            return b.fadd(totals[r, v], load(_place(b, out, out_row, r, v), vec))

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
            b.store(totals[r, v], at(_place(b, out, out_row, r, v), vec)).align = 4
        b.ret_void()

    return tile


def _place(b: ir.IRBuilder, out: ir.Value, out_row: ir.Value, r: int, v: int) -> ir.Value:
    return b.add(out, b.add(b.mul(out_row, _I64(r)), _I64(4 * LANES * v)))


def declared(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    return module.globals[name] if name in module.globals else ir.Function(module, kind, name)


def _by_rows(most: int, vectors: int, chains: int) -> Any:
    """A function of (rows, the arguments of a tile but the last, ahead, end) -> ahead: tiles of at most so many rows.

    Each goes on asking from where the one before it stopped, until `end`.
    """
    full, four, three, two, one = (_tile(rows, vectors, chains) for rows in (most, 4, 3, 2, 1))

    @part()
    def multiply(rows, kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, ahead, end):
        left, asked, scaled = rows, size // AT_ONCE * chains * LINE, 4 if row_scales != 0 else 0
        while left > 0:
            line = ahead if ahead < end else w  # what is there already costs nothing
            if left >= most:
                full(kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line)
                did = most
            elif left >= 4:
                four(kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line)
                did = 4
            elif left == 3:
                three(kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line)
                did = 3
            elif left == 2:
                two(kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line)
                did = 2
            else:
                one(kind, x, x_row, w, w_row, size, out, out_row, row_scales, scales, add, line)
                did = 1
            x, out, row_scales = x + did * x_row, out + did * out_row, row_scales + did * scaled
            left, ahead = left - did, ahead + asked
        return ahead

    return multiply


multiply_wide = _by_rows(ROWS, VECTORS, 1)
multiply_narrow = _by_rows(3 if LANES < NARROW else ROWS, NARROW // LANES, 2)
