"""Functions of vectors of numbers: the arithmetic between products."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from engine.backends.cpu.jit import part
from engine.backends.cpu.paged_tile import PART
from engine.backends.cpu.simd import (
    F32,
    HAS_PAIR_PRODUCTS,
    I8,
    I16,
    I32,
    I64,
    ITEM,
    LANES,
    Loop,
    Vectors,
    intrinsic,
)
from engine.backends.cpu.tile import HIGH_STEP

HIGH_BITS = HIGH_STEP.bit_length() - 1
MIN_EXPONENT, MAX_EXPONENT = -87.0, 88.0  # of e: float32 holds the powers between them
LOG2_E = math.log2(math.e)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts: multiples of the first are exact
EXP_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
BFLOAT16_ITEM = 2  # bytes
ROTATED = PART // 2  # points: half of a head is as many, or several times
BFLOAT16_NAN = 0x7FC0  # its bits; rounding by the bits alone could make another of them a number
TWICE_GELU_SCALE, GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def _exp(v: Vectors, x: ir.Value) -> ir.Value:
    """Return e^x within two units of the last place, 0 for x less than MIN_EXPONENT (Cephes' expf; Moshier,
    1989)."""
    b, none = v.b, v.b.fcmp_ordered("<", x, v.constant(MIN_EXPONENT))  # a NaN is not less, and stays one
    x = b.select(none, v.constant(MIN_EXPONENT), x)
    x = b.select(b.fcmp_ordered(">", x, v.constant(MAX_EXPONENT)), v.constant(MAX_EXPONENT), x)
    n = v.call("floor", v.call("fma", x, v.constant(LOG2_E), v.constant(0.5)))  # e^x = 2^n e^r
    r = v.call("fma", n, v.constant(-LN2_LOW), v.call("fma", n, v.constant(-LN2_HIGH), x))
    series = v.constant(EXP_SERIES[0])
    for coefficient in EXP_SERIES[1:]:
        series = v.call("fma", series, r, v.constant(coefficient))
    e_r = b.fadd(v.call("fma", series, b.fmul(r, r), r), v.constant(1.0))
    ints = ir.VectorType(I32, v.count)
    exponent = b.add(b.fptosi(n, ints), ir.Constant(ints, [127] * v.count))  # the bits of 2^n
    two_n = b.bitcast(b.shl(exponent, ir.Constant(ints, [23] * v.count)), v.kind)
    return b.select(none, v.constant(0.0), b.fmul(e_r, two_n))


@intrinsic
def address(typing, array):
    """Return the address of an array's first number."""

    def call(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, I64)

    return types.int64(array), call


@intrinsic
def number_at(typing, address):
    """Return the float32 at an address."""

    def call(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], F32.as_pointer()))

    return types.float32(types.int64), call


@intrinsic
def widened(typing, number):
    """Return a number as float32: one that is, or the upper half of its bits, which is a bfloat16."""

    def call(context, builder, signature, args):
        if number == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), F32)

    return types.float32(number), call


@intrinsic
def store_as(typing, number, address, dtype):
    """Store a float32 at an address as a number of a dtype: as it is, or as the bits of the nearest bfloat16,
    the even one of two."""

    def call(context, builder, signature, args):
        stored = args[0] if dtype.dtype == types.float32 else _bfloat16_bits(builder, args[0])
        builder.store(stored, builder.inttoptr(args[1], stored.type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.float32, types.int64, dtype), call


def _bfloat16_bits(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return the bits of the bfloat16 nearest to a float32, or of the even one of two, or those of a vector.

    LLVM's own conversion is a call of a function that is not there, where no instruction does it.
    """
    count = x.type.count if isinstance(x.type, ir.VectorType) else 0
    whole, half = (ir.VectorType(bits, count) if count else bits for bits in (I32, I16))

    def number(value: int) -> ir.Constant:
        return ir.Constant(whole, [value] * count if count else value)

    bits = b.bitcast(x, whole)
    odd = b.and_(b.lshr(bits, number(16)), number(1))
    nearest = b.lshr(b.add(bits, b.add(odd, number(0x7FFF))), number(16))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), number(BFLOAT16_NAN), nearest), half)


def _written(count: int, result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: compiled code can call the function that it decorates, which writes instructions on
    vectors of `count` float32 from (Vectors, arguments), and returns the result or None."""

    def make(write: Callable[..., Any]) -> Any:
        def call(context, builder, signature, args):
            value = write(Vectors(builder, count), *args)
            return context.get_dummy_value() if value is None else value

        made = result(*arguments), call
        takes = {1: lambda typing, a: made, 2: lambda typing, a, b: made}
        takes |= {3: lambda typing, a, b, c: made, 4: lambda typing, a, b, c, d: made}
        return intrinsic(takes[len(arguments)])

    return make


@_written(LANES, types.void, types.int64, types.int64)
def _narrow(v: Vectors, x: ir.Value, out: ir.Value) -> None:
    """Write LANES numbers as bfloat16, each the nearest, or the even one of two."""
    _store_narrow(v, v.load(x), out)


def _store_narrow(v: Vectors, numbers: ir.Value, address: ir.Value) -> None:
    bits = v.bfloat16(numbers) if HAS_PAIR_PRODUCTS else _bfloat16_bits(v.b, numbers)
    v.b.store(bits, v.pointer(address, bits.type)).align = 2


@part()
def narrow(x, out, size):
    """Write so many numbers as bfloat16, LANES at a time."""
    for n in range(0, size, LANES):
        _narrow(x + n * ITEM, out + n * BFLOAT16_ITEM)


@_written(LANES, types.float32, types.int64)
def max_abs(v: Vectors, address: ir.Value) -> ir.Value:
    """Return the largest of LANES numbers without their signs; a NaN if one is."""
    return v.reduce("fmaximum", v.call("fabs", v.load(address)))


@_written(LANES, types.void, types.int64, types.float32, types.int64, types.int64)
def split_in_bytes(v: Vectors, x: ir.Value, scale: ir.Value, high: ir.Value, low: ir.Value) -> None:
    """Write scale * x of LANES numbers, to the nearest, or the even one of two, as HIGH_STEP times an int8 at
    `high` and one at `low`, which is from -HIGH_STEP / 2 on."""
    b, ints, small = v.b, ir.VectorType(I32, v.count), ir.VectorType(I8, v.count)
    half, step, bits = (ir.Constant(ints, [n] * v.count) for n in (HIGH_STEP // 2, HIGH_STEP, HIGH_BITS))
    whole = b.fptosi(v.call("roundeven", b.fmul(v.load(x), v.broadcast(scale))), ints)
    upper = b.ashr(b.add(whole, half), bits)
    for value, address in ((upper, high), (b.sub(whole, b.mul(upper, step)), low)):
        b.store(b.trunc(value, small), v.pointer(address, small)).align = 1


@_written(LANES, types.float32, types.float32)
def exp(v: Vectors, x: ir.Value) -> ir.Value:
    """Return e^x."""
    return v.b.extract_element(_exp(v, v.broadcast(x)), I32(0))


def _over(
    v: Vectors, begin: ir.Value, end: ir.Value, start: float, step: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Write a loop over the vectors from an address to another, one at least; return what `step` makes of
    each one's address and of what it made of the one before, from a vector of `start` on."""
    loop = Loop(v.b)
    place, value = loop.carry(begin), loop.carry(v.constant(start))
    after, following = step(place, value), v.b.add(place, I64(ITEM * v.count))
    loop.end([(place, following), (value, after)], again=v.b.icmp_signed("<", following, end))
    return after


@_written(PART, types.float32, types.int64, types.int64)
def vector_max(v: Vectors, begin: ir.Value, end: ir.Value) -> ir.Value:
    """Return the largest of the numbers from an address to another, PART at a time; NaNs do not count."""

    def step(at: ir.Value, most: ir.Value) -> ir.Value:
        return v.call("maxnum", most, v.load(at))

    largest = _over(v, begin, end, -math.inf, step)  # no NaN: LLVM need not look for one, number by number
    return v.reduce("fmax", largest, fast=("nnan",))


@_written(PART, types.float32, types.int64, types.int64, types.float32)
def exp_minus_max_sum(v: Vectors, begin: ir.Value, end: ir.Value, peak: ir.Value) -> ir.Value:
    """Put e^(x - peak) in place of numbers x, PART at a time; return their sum."""
    return _exp_minus_max_sum(v, begin, end, peak, v.store)


@_written(PART, types.float32, types.int64, types.int64, types.float32)
def exp_minus_max_sum_narrow(v: Vectors, begin: ir.Value, end: ir.Value, peak: ir.Value) -> ir.Value:
    """As `exp_minus_max_sum`, but write the powers as bfloat16 from the same address on, behind what is to be
    read. Return the sum of what they were in float32."""

    def store(powers: ir.Value, at: ir.Value) -> None:
        _store_narrow(v, powers, v.b.add(begin, v.b.lshr(v.b.sub(at, begin), I64(1))))

    return _exp_minus_max_sum(v, begin, end, peak, store)


def _exp_minus_max_sum(
    v: Vectors, begin: ir.Value, end: ir.Value, peak: ir.Value, store: Callable[[ir.Value, ir.Value], None]
) -> ir.Value:
    peaks = v.broadcast(peak)

    def step(at: ir.Value, total: ir.Value) -> ir.Value:
        powers = _exp(v, v.b.fsub(v.load(at), peaks))
        store(powers, at)
        return v.b.fadd(total, powers)

    return v.reduce("fadd", F32(0.0), _over(v, begin, end, 0.0, step), fast=("reassoc",))


@_written(PART, types.void, types.int64, types.int64, types.float32)
def rescale(v: Vectors, begin: ir.Value, end: ir.Value, by: ir.Value) -> None:
    """Multiply numbers by one, PART at a time."""
    factors = v.broadcast(by)

    def step(at: ir.Value, nothing: ir.Value) -> ir.Value:
        v.store(v.b.fmul(v.load(at), factors), at)
        return nothing

    _over(v, begin, end, 0.0, step)


@_written(ROTATED, types.void, types.int64, types.int64, types.int64, types.int64)
def rotate(v: Vectors, x: ir.Value, y: ir.Value, cos: ir.Value, sin: ir.Value) -> None:
    """Rotate ROTATED points of a plane, of which coordinates, cosines and sines lie at these addresses."""
    old_x, old_y, c, s = map(v.load, (x, y, cos, sin))
    v.store(v.call("fma", old_x, c, v.b.fneg(v.b.fmul(old_y, s))), x)
    v.store(v.call("fma", old_y, c, v.b.fmul(old_x, s)), y)


@_written(LANES, types.void, types.int64)
def prefetch_to_write(v: Vectors, address: ir.Value) -> None:
    """Ask for the cache line at an address, which is going to be written to."""
    v.prefetch(address, to_write=True)


@_written(LANES, types.void, types.int64, types.float32)
def soft_cap(v: Vectors, address: ir.Value, cap: ir.Value) -> None:
    """Put cap * tanh(x / cap) in place of LANES numbers x."""
    caps, x = v.broadcast(cap), v.load(address)
    power = _exp(v, v.b.fdiv(v.b.fmul(v.constant(2.0), x), caps))  # tanh(y) is 1 - 2 / (1 + e^2y)
    below_1 = v.b.fdiv(v.constant(2.0), v.b.fadd(v.constant(1.0), power))
    v.store(v.b.fmul(caps, v.b.fsub(v.constant(1.0), below_1)), address)


@_written(LANES, types.void, types.int64, types.int64)
def silu(v: Vectors, gate: ir.Value, up: ir.Value) -> None:
    """Put gate * sigmoid(gate) * up in place of gate, for LANES numbers each."""
    _gate(v, gate, up, lambda x: x)


@_written(LANES, types.void, types.int64, types.int64)
def gelu(v: Vectors, gate: ir.Value, up: ir.Value) -> None:
    """Put GELU(gate) * up in place of gate, for LANES numbers each, by GELU's tanh approximation (Hendrycks
    and Gimpel, 2016)."""

    def twice(x: ir.Value) -> ir.Value:  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        slope = v.call(
            "fma", v.b.fmul(x, x), v.constant(TWICE_GELU_SCALE * GELU_CUBIC), v.constant(TWICE_GELU_SCALE)
        )
        return v.b.fmul(x, slope)

    _gate(v, gate, up, twice)


def _gate(v: Vectors, gate: ir.Value, up: ir.Value, argument: Callable[[ir.Value], ir.Value]) -> None:
    """Put gate * sigmoid(argument(gate)) * up in place of gate."""
    x = v.load(gate)
    below = v.b.fadd(v.constant(1.0), _exp(v, v.b.fsub(v.constant(0.0), argument(x))))
    v.store(v.b.fmul(v.b.fdiv(x, below), v.load(up)), gate)


@_written(PART, types.float32, types.int64, types.int64)
def _sum_of_squares(v: Vectors, begin: ir.Value, end: ir.Value) -> ir.Value:
    """Return the sum of the squares of the numbers from an address to another, PART at a time."""

    def step(at: ir.Value, total: ir.Value) -> ir.Value:
        x = v.load(at)
        return v.call("fma", x, x, total)

    return v.reduce("fadd", F32(0.0), _over(v, begin, end, 0.0, step), fast=("reassoc",))


@part()
def inverse_rms(x, size, eps):
    """Return the factor of an RMS norm of `size` numbers at an address: 1 / sqrt(mean(x^2) + eps)."""
    whole = x + size // PART * PART * ITEM
    total = _sum_of_squares(x, whole) if size >= PART else np.float32(0.0)
    for at in range(whole, x + size * ITEM, ITEM):
        total += number_at(at) * number_at(at)
    return np.float32(1.0) / np.sqrt(total / np.float32(size) + np.float32(eps))


@part()
def add_norm(y_TM, begin, end, size, eps, scale_M, x_TM):
    """Add the RMS norm of y to x, for rows from begin to end."""
    for t in range(begin, end):
        row_scale = inverse_rms(address(y_TM[t]), size, eps)
        for m in range(size):
            x_TM[t, m] += row_scale * y_TM[t, m] * scale_M[m]
