"""This processor's vector registers, and float32 vectors as LLVM instructions.

Loops over rows and tokens are Python that Numba compiles. The arithmetic inside them is written as LLVM's
vectors, so that registers are used as meant on any processor.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core.registry import cpu_target

intrinsic: Any = extending.intrinsic  # its type does not say that what it makes lacks the first argument


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for; only whole vectors of it are written here."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


class Registers(NamedTuple):
    """A processor's vector registers."""

    lanes: int  # float32 numbers in one of them
    total: int


AVX2, AVX512, NEON = Registers(8, 16), Registers(16, 32), Registers(4, 32)
X86 = platform.machine() in ("x86_64", "AMD64")
FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")  # of what Numba compiles for
if X86 and "+fma" not in FEATURES:
    raise ImportError("this processor has no fused multiply-add")
REGISTERS = AVX512 if "+avx512f" in FEATURES else AVX2 if X86 else NEON
LANES = REGISTERS.lanes
# An instruction adds the products of pairs of bfloat16 to 16 sums (AVX512_BF16).
HAS_PAIR_PRODUCTS = REGISTERS == AVX512 and "+avx512bf16" in FEATURES
# An instruction adds the products of four bytes each to int32 sums (AVX512_VNNI, or AVX_VNNI with AVX2).
HAS_QUAD_PRODUCTS = ("+avx512vnni" if REGISTERS == AVX512 else "+avxvnni") in FEATURES
ITEM = 4  # bytes of a float32
CACHE_LINE = 64  # bytes that the memory gives at once

BF16 = _BFloat16()
F32, I8, I16, I32, I64 = ir.FloatType(), *map(ir.IntType, (8, 16, 32, 64))


def declared(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    """Return a module's function of this name, declared where it is not there yet."""
    return module.globals[name] if name in module.globals else ir.Function(module, kind, name)


class Vectors:
    """Writes instructions on vectors of `count` float32 with a builder. Addresses are integers."""

    def __init__(self, builder: ir.IRBuilder, count: int) -> None:
        self.b, self.kind, self.count = builder, ir.VectorType(F32, count), count

    def pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.b.inttoptr(address, kind.as_pointer())

    def load(self, address: ir.Value, kind: ir.Type | None = None, align: int = ITEM) -> ir.Value:
        """Load a vector, or a value of another kind."""
        value = self.b.load(self.pointer(address, kind or self.kind))
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.b.store(value, self.pointer(address, self.kind)).align = ITEM

    def prefetch(self, address: ir.Value, to_write: bool = False) -> None:
        """Ask for the cache line at an address, for the second cache."""
        hint = ir.FunctionType(ir.VoidType(), [I32.as_pointer(), I32, I32, I32])
        prefetch = declared(self.b.module, "llvm.prefetch.p0", hint)
        second_cache, data = I32(2), I32(1)
        self.b.call(prefetch, [self.pointer(address, I32), I32(int(to_write)), second_cache, data])

    def constant(self, number: float) -> ir.Constant:
        """Return a vector of one number, rounded to float32."""
        return ir.Constant(self.kind, [float(np.float32(number))] * self.count)

    def broadcast(self, number: ir.Value) -> ir.Value:
        first = self.b.insert_element(ir.Constant(self.kind, ir.Undefined), number, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return self.b.shuffle_vector(first, first, zeros)

    def call(self, name: str, *values: ir.Value) -> ir.Value:
        """Call LLVM's intrinsic of vectors alone, such as "fma"."""
        kind = ir.FunctionType(self.kind, [self.kind] * len(values))
        return self.b.call(declared(self.b.module, f"llvm.{name}.v{self.count}f32", kind), values)

    def bfloat16(self, x: ir.Value) -> ir.Value:
        """Return a vector as the nearest bfloat16, by an instruction of AVX512_BF16, to which numbers below
        full precision are zeros."""
        kind = ir.FunctionType(ir.VectorType(BF16, self.count), [self.kind])
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * self.count}"
        return self.b.call(declared(self.b.module, name, kind), [x])

    def reduce(self, name: str, *values: ir.Value, fast: tuple[str, ...] = ()) -> ir.Value:
        """Call LLVM's intrinsic that makes one number of a vector, such as "fmax"."""
        kind = ir.FunctionType(F32, [value.type for value in values])
        function = declared(self.b.module, f"llvm.vector.reduce.{name}.v{self.count}f32", kind)
        return self.b.call(function, values, fastmath=fast)


class Loop:
    """A loop that runs at least once, and the values that it carries from one iteration to the next."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self._b, self._before = b, b.block
        self._body, self._after = b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(self._body)
        b.position_at_end(self._body)

    def carry(self, start: ir.Value) -> ir.PhiInstr:
        """Return a value that is `start` in the first iteration."""
        value = self._b.phi(start.type)
        value.add_incoming(start, self._before)
        return value

    def end(self, following: Iterable[tuple[ir.PhiInstr, ir.Value]], again: ir.Value) -> None:
        """Give each carried value the one that follows it, and go on behind the loop unless `again`."""
        for value, after in following:
            value.add_incoming(after, self._b.block)
        self._b.cbranch(again, self._body, self._after)
        self._b.position_at_end(self._after)
