"""Functions of vectors, for what lies between products."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from engine.backends.cpu.gemm import LANES, NARROW, declared, intrinsic
from engine.backends.cpu.jit import part

FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order, but no promise that there are no NaNs
LEAST, MOST = -87.0, 88.0  # what float32 has a power of e for
LOG2E, HIGH, LOW = math.log2(math.e), 0.693359375, -2.12194440e-4  # the last two are the logarithm of 2
SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
GELU, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


class _Vectors:
    """Writes functions of `count` float32 at a time with a builder."""

    def __init__(self, builder: ir.IRBuilder, count: int) -> None:
        self.b, self.kind, self.count = builder, ir.VectorType(_F32, count), count

    def load(self, address: ir.Value) -> ir.Value:
        value = self.b.load(self.b.inttoptr(address, self.kind.as_pointer()))
        value.align = 4
        return value

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.b.store(value, self.b.inttoptr(address, self.kind.as_pointer())).align = 4

    def all(self, number: float) -> ir.Constant:
        return ir.Constant(self.kind, [float(np.float32(number))] * self.count)

    def spread(self, number: ir.Value) -> ir.Value:
        first = self.b.insert_element(ir.Constant(self.kind, ir.Undefined), number, _I32(0))
        return self.b.shuffle_vector(
            first, first, ir.Constant(ir.VectorType(_I32, self.count), [0] * self.count)
        )

    def call(self, name: str, *values: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.kind, [self.kind] * len(values))
        return self.b.call(declared(self.b.module, f"llvm.{name}.v{self.count}f32", kind), values)

    def reduce(self, name: str, *values: ir.Value, fast: tuple[str, ...] = ()) -> ir.Value:
        kind = ir.FunctionType(_F32, [value.type for value in values])
        function = declared(self.b.module, f"llvm.vector.reduce.{name}.v{self.count}f32", kind)
        return self.b.call(function, values, fastmath=fast)

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x within two units of the last place, 0 for what is less than LEAST (Cephes' expf; Moshier,
        1989)."""
        b, none = self.b, self.b.fcmp_ordered("<", x, self.all(LEAST))  # a NaN is not less, and stays one
        x = b.select(none, self.all(LEAST), x)
        x = b.select(b.fcmp_ordered(">", x, self.all(MOST)), self.all(MOST), x)
        n = self.call("floor", self.call("fma", x, self.all(LOG2E), self.all(0.5)))
        r = self.call("fma", n, self.all(-LOW), self.call("fma", n, self.all(-HIGH), x))
        series = functools.reduce(
            lambda p, c: self.call("fma", p, r, self.all(c)), SERIES[1:], self.all(SERIES[0])
        )
        power = b.fadd(self.call("fma", series, b.fmul(r, r), r), self.all(1.0))
        ints = ir.VectorType(_I32, self.count)
        bits = b.add(b.fptosi(n, ints), ir.Constant(ints, [127] * self.count))
        powers = b.fmul(power, b.bitcast(b.shl(bits, ir.Constant(ints, [23] * self.count)), self.kind))
        return b.select(none, self.all(0.0), powers)


@intrinsic
def address(typing, array):
    """Where an array begins."""

    def call(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), call


def _written(count: int, result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function that compiled code can call from one that writes it: (vectors, arguments) -> result or
    None."""

    def make(write: Callable[..., Any]) -> Any:
        def call(context, builder, signature, args):
            value = write(_Vectors(builder, count), *args)
            return context.get_dummy_value() if value is None else value

        made = result(*arguments), call
        return intrinsic((lambda typing, a: made) if len(arguments) == 1 else (lambda typing, a, b: made))

    return make


@_written(LANES, types.float32, types.float32)
def exp(v: _Vectors, x: ir.Value) -> ir.Value:
    """e^x."""
    return v.b.extract_element(v.exp(v.spread(x)), _I32(0))


@_written(NARROW, types.float32, types.int64)
def vector_max(v: _Vectors, address: ir.Value) -> ir.Value:
    """The largest of NARROW numbers; NaNs do not count."""
    return v.reduce("fmax", v.load(address))


@_written(NARROW, types.float32, types.int64, types.float32)
def exp_minus_max_sum(v: _Vectors, address: ir.Value, peak: ir.Value) -> ir.Value:
    """Put e^(x - peak) in place of NARROW numbers x; gives their sum."""
    powers = v.exp(v.b.fsub(v.load(address), v.spread(peak)))
    v.store(powers, address)
    return v.reduce("fadd", _F32(0.0), powers, fast=("reassoc",))


@_written(NARROW, types.void, types.int64, types.float32)
def rescale(v: _Vectors, address: ir.Value, by: ir.Value) -> None:
    """Multiply NARROW numbers by one."""
    v.store(v.b.fmul(v.load(address), v.spread(by)), address)


@_written(LANES, types.void, types.int64, types.float32)
def soft_cap(v: _Vectors, address: ir.Value, cap: ir.Value) -> None:
    """Put cap * tanh(x / cap) in place of LANES numbers x."""
    caps, x = v.spread(cap), v.load(address)
    power = v.exp(v.b.fdiv(v.b.fmul(v.all(2.0), x), caps))  # tanh(y) is 1 - 2 / (1 + e^2y)
    part = v.b.fdiv(v.all(2.0), v.b.fadd(v.all(1.0), power))
    v.store(v.b.fmul(caps, v.b.fsub(v.all(1.0), part)), address)


@_written(LANES, types.void, types.int64, types.int64)
def silu(v: _Vectors, gate: ir.Value, up: ir.Value) -> None:
    """gate = gate * sigmoid(gate) * up, for LANES numbers each."""
    _gate(v, gate, up, lambda x: x)


@_written(LANES, types.void, types.int64, types.int64)
def gelu(v: _Vectors, gate: ir.Value, up: ir.Value) -> None:
    """gate = GELU(gate) * up, by its tanh approximation (Hendrycks and Gimpel, 2016), for LANES numbers
    each."""

    def twice(x: ir.Value) -> ir.Value:  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        square = v.call("fma", v.b.fmul(x, x), v.all(GELU * CUBE), v.all(GELU))
        return v.b.fmul(x, square)

    _gate(v, gate, up, twice)


def _gate(v: _Vectors, gate: ir.Value, up: ir.Value, of: Callable[[ir.Value], ir.Value]) -> None:
    x = v.load(gate)
    below = v.b.fadd(v.all(1.0), v.exp(v.b.fsub(v.all(0.0), of(x))))
    v.store(v.b.fmul(v.b.fdiv(x, below), v.load(up)), gate)


@part(fastmath=FAST)
def inverse_rms(x_TN, t, begin, size, eps):
    """Return what an RMS norm of `size` numbers of row t multiplies them by, 1 / sqrt(mean(x^2) + eps)."""
    total = np.float32(0.0)
    for n in range(begin, begin + size):
        total += x_TN[t, n] * x_TN[t, n]
    return np.float32(1.0) / np.sqrt(total / np.float32(size) + np.float32(eps))


@part(fastmath=FAST)
def add_norm(y_TM, begin, end, size, eps, scale_M, x_TM):
    """x += the RMS norm of y, for rows from begin to end."""
    for t in range(begin, end):
        row_scale = inverse_rms(y_TM, t, np.int64(0), size, eps)
        for m in range(size):
            x_TM[t, m] += row_scale * y_TM[t, m] * scale_M[m]
