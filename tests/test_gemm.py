"""Tiles as they are compiled, for this processor and for others: no sum of a loop is on the stack."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import from_dtype, njit, types

from engine.backends.cpu import gemm, model, paged_tile, simd
from engine.backends.cpu.forward import forward
from engine.backends.cpu.gemm import NUMBERS, PAGED_TILES, PAGED_WIDENED_TILES, WIDE_TILES, WIDENED_TILES
from engine.backends.cpu.jit import OPTIONS
from engine.backends.cpu.matrix_tile import HAS_MATRIX_UNIT
from engine.backends.cpu.paged_tile import PART, emit_paged_tile
from engine.backends.cpu.simd import AVX2, AVX512, NEON, REGISTERS, Registers
from engine.backends.cpu.tile import HIGH_STEP, K_UNROLL, PAIR, QUAD, SIGNATURE, ZERO_BYTE, Tile, emit_tile
from engine.backends.cpu.vector_math import address
from engine.step import Batch, Span
from tests.test_cpu import compiled_decoder, random_model
from tests.test_paged_tile import paged

F32, I8, I16 = ir.FloatType(), ir.IntType(8), ir.IntType(16)
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
PROCESSORS = [
    *((X86, AVX2, name) for name in ("x86-64-v3", "alderlake", "znver3")),
    *((X86, AVX512, name) for name in ("skylake-avx512", "sapphirerapids", "znver4")),
    *((ARM, NEON, name) for name in ("generic", "neoverse-v1", "apple-m1")),
]
HAVE_PAIR_PRODUCTS = "sapphirerapids", "znver4"
HAVE_QUAD_PRODUCTS = "sapphirerapids", "znver4", "alderlake"
VECTOR = {AVX2: "%ymm", AVX512: "%zmm", NEON: r"v\d+\.4s"}
FMA = r"vfn?m(add|sub)|fml[as] |vdpbf16ps|(\{vex\} )?vpdpbusd"
JUMP = r"(?:j|b|cb|tb)[\w.]* (?:.*, )?(\.?L\w+)$"


def compiled(triple: str, processor: str, shapes: list[tuple[Tile, ir.Type]]) -> str:
    """Assembly of tiles."""
    module = ir.Module()
    for shape, number in shapes:
        if shape.chains == 1:
            emit_tile(ir.Function(module, SIGNATURE, shape.name(number)), shape, number)
        else:  # of keys and values
            name, called = paged_tile.PREFIX + shape.name(number), paged_tile.SIGNATURE
            emit_paged_tile(ir.Function(module, called, name), shape, number)
    return machine_code(triple, processor, module)


def machine_code(triple: str, processor: str, module: ir.Module) -> str:
    """Assembly of a module, after the passes that Numba has LLVM make."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(str(error))
    machine = target.create_target_machine(processor, opt=3, codemodel="jitdefault", jit=True)
    module.triple = triple
    parsed = llvm.parse_assembly(str(module))
    for level in (0, 3):
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=level))
        passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def functions(assembly: str) -> dict[str, list[str]]:
    """Lines of each tile's function: labels, and instructions with one space between their parts."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for commented in assembly.splitlines():
        line = " ".join(re.sub(r"(#+ |//).*", "", commented).split())
        if label := re.match(rf"_?(?:{paged_tile.PREFIX})?(tile_\w+):$", line):
            lines = found[label[1]] = []
        elif re.match(r"(?!\.?L)\S+:$", line):  # another function, or data
            lines = []
        elif line.endswith(":") or (line and line[0] not in ".#"):
            lines.append(line)
    return found


def loop(lines: list[str]) -> list[str]:
    """Instructions of the innermost loops: basic blocks that lead to themselves at once."""
    blocks: list[tuple[set[str], list[str]]] = [(set(), [])]  # labels, and instructions
    for line in lines:
        labels, block = blocks[-1]
        if line.endswith(":"):
            if block:
                blocks.append(({line[:-1]}, []))
            else:
                labels.add(line[:-1])
        else:
            block.append(line)
            if re.match(JUMP, line):
                blocks.append((set(), []))
    jumps = ((labels, block, re.match(JUMP, block[-1])) for labels, block in blocks if block)
    return [line for labels, block, jump in jumps if jump and jump[1] in labels for line in block]


def stack_traffic(lines: list[str]) -> list[str]:
    """Instructions of the loop that name the stack pointer, or a register that is set from it."""
    pointers = {"rsp", "sp"}
    for line in lines:
        pointers.update(re.findall(r"^(?:movq %rsp|leaq .*%rsp.*), %(r\w+)$", line))
        pointers.update(re.findall(r"^(?:mov|add|sub) (x\d+), sp\b", line))
    return [line for line in loop(lines) if re.search(rf"\b({'|'.join(pointers)})\b", line)]


def check(lines: list[str], registers: Registers, shape: Tile, number: ir.Type = F32) -> None:
    """A tile's loop touches no stack, and its sums are whole vectors, each once an iteration; nor do any lie
    there from page to page."""
    assert stack_traffic(lines) == []
    if shape.chains > 1:
        assert [line for line in lines if re.search(r"mm\d+.*\(%rsp|\(%rsp.*mm\d|\b[qv]\d.*\[sp", line)] == []
    sums = [line for line in loop(lines) if re.match(FMA, line)]
    assert all(re.search(VECTOR[registers], line) for line in sums)
    iteration = K_UNROLL * (2 if number in (I16, QUAD) else 1) * shape.rows * shape.vectors
    if number in (PAIR, QUAD):
        assert all(("vdpbf16ps" if number == PAIR else "vpdpbusd") in line for line in sums)
    assert len(sums) in (iteration, 2 * iteration), "of one iteration, or of two where LLVM unrolls the loop"


def every(registers: Registers, number: ir.Type) -> list[Tile]:
    """The tiles of weights of this type, and of keys and values."""
    wide, paged = WIDE_TILES[registers], PAGED_TILES[registers]
    tallest = {I16: WIDENED_TILES[registers], QUAD: wide._replace(rows=wide.rows // 2)}.get(number, wide)
    of_keys = {F32: paged, PAIR: paged, I16: PAGED_WIDENED_TILES[registers]}.get(number)
    both = [tallest] if of_keys is None else [tallest, of_keys]
    return [shape._replace(rows=rows) for shape in both for rows in range(1, shape.rows + 1)]


@pytest.mark.parametrize(
    ("triple", "registers", "processor"),
    [pytest.param(*one, marks=pytest.mark.slow if i % 3 else ()) for i, one in enumerate(PROCESSORS)],
)
def test_no_loop_of_a_tile_touches_the_stack(triple, registers, processor):
    numbers = [F32, I8, I16, *([PAIR] if processor in HAVE_PAIR_PRODUCTS else [])]
    numbers += [QUAD] if processor in HAVE_QUAD_PRODUCTS else []
    shapes = [(shape, number) for number in numbers for shape in every(registers, number)]
    found = functions(compiled(triple, processor, shapes))
    for shape, number in shapes:
        check(found[shape.name(number)], registers, shape, number)


@pytest.mark.parametrize(("triple", "registers", "processor"), PROCESSORS[::3])
def test_sums_on_the_stack_are_seen(triple, registers, processor):
    """Of a tile that has more of them than there are registers."""
    large = WIDE_TILES[registers]._replace(rows=registers.total // 3 + 1)
    [lines] = functions(compiled(triple, processor, [(large, F32)])).values()
    assert any(re.search(r"mm\d|\b[qv]\d", line) for line in stack_traffic(lines))
    with pytest.raises(AssertionError):
        check(lines, registers, large)


@pytest.mark.slow
def test_a_step_gathers_nothing_counts_no_references_and_keeps_tiles_off_the_stack(monkeypatch):
    """As Numba compiles it for this processor, with all that it knows of a step."""
    fresh = njit(forward.py_func, **OPTIONS)
    monkeypatch.setattr(model, "forward", fresh)
    # Whole vectors of inner steps: int8 weights lie in quads, where a processor multiplies those.
    packed = compiled_decoder(random_model(intermediate_size=144))
    packed.logits(Batch([5, 6, 7], [Span(0, 3, 0, [0])], [2]))
    packed.quantize()
    packed.allocate_kv(1)
    packed.logits(Batch([5, 6, 7], [Span(0, 3, 0, [0])], [2]))
    compiled_decoder(random_model().bfloat16()).logits(Batch([5, 6, 7], [Span(0, 3, 0, [0])], [2]))
    numbers = F32, NUMBERS.get(types.uint8, I8), NUMBERS[types.uint16]
    for assembly, number in zip(fresh.inspect_asm().values(), numbers, strict=True):
        assert "NRT_" not in assembly
        found = functions(assembly)
        for shape in every(REGISTERS, number):
            check(found[shape.name(number)], REGISTERS, shape, number)
    for code in fresh.inspect_llvm().values():
        parts = re.findall(
            r"^define [^\n]*3cpu(?:6linear|4rope|9attention|11vector_math).*?^}", code, re.M | re.S
        )
        assert len(parts) >= 4
        assert [part.splitlines()[0] for part in parts if re.search(r"masked\.(gather|scatter)", part)] == []


@njit
def wide(x_RM, panels_CMW, scales_CW, row_scales_R, row_starts_U, out_RN):
    """out += row_scales * scales * x by panels; returns how many bytes are prefetched meanwhile."""
    rows, size, width, prefetched = len(out_RN), x_RM.shape[1], panels_CMW.shape[2], 0
    for panel in range(len(panels_CMW)):
        prefetched += gemm.multiply_wide(
            rows, panels_CMW.dtype, address(x_RM), x_RM.itemsize * size, address(panels_CMW[panel]),
            width * panels_CMW.itemsize, size, address(out_RN) + 4 * panel * width, 4 * out_RN.shape[1],
            address(row_scales_R), address(row_starts_U), address(scales_CW[panel]), 1, 0, panels_CMW.nbytes,
        )  # fmt: skip
    return prefetched


ROWS, SIZE, OUTPUTS = 30, 96, 48  # whole panels of any width
DTYPES = [np.float32, np.int8, np.uint16, *([np.uint8] if simd.HAS_QUAD_PRODUCTS else [])]
DTYPES += [np.int16] if HAS_MATRIX_UNIT else []
BFLOAT16 = np.uint16, np.int16


class Product:
    """Numbers of a product, with weights of a type."""

    def __init__(self, dtype: type) -> None:
        rng = np.random.default_rng(0)
        self.x_RM = rng.normal(size=(ROWS, SIZE)).astype(np.float32)
        if dtype in BFLOAT16:  # only numbers that it has
            self.x_RM = (self.x_RM.view(np.uint32) & 0xFFFF0000).view(np.float32)
        if dtype is np.uint8:
            self.x_RM = rng.integers(-127 * HIGH_STEP, 127 * HIGH_STEP + 1, (ROWS, SIZE)).astype(np.float32)
        self.w_MN = rng.integers(-127, 128, (SIZE, OUTPUTS)).astype(
            np.int8 if dtype is np.int8 else np.float32
        )
        self.dtype = dtype
        self.scales_N = rng.random(OUTPUTS).astype(np.float32)
        self.row_scales_R = rng.random(ROWS).astype(np.float32)

    def of(self, rows: slice) -> tuple[np.ndarray, int]:
        """1 + the product of these rows, and how many bytes were prefetched."""
        x_RM, row_scales_R = self.x_RM[rows], self.row_scales_R[rows]
        row_starts_U = np.zeros(0, np.int32)
        panels_CMW = np.ascontiguousarray(self.w_MN.reshape(SIZE, -1, gemm.WIDE).swapaxes(0, 1))
        if self.dtype in BFLOAT16:  # upper halves, in pairs of inner steps
            halves = (panels_CMW.view(np.uint32) >> 16).astype(self.dtype)
            pairs = halves.reshape(len(halves), SIZE // 2, 2, gemm.WIDE).swapaxes(2, 3)
            panels_CMW = np.ascontiguousarray(pairs).reshape(halves.shape)
            if NUMBERS[types.uint16] == PAIR:
                more = np.zeros((2 * ROWS, SIZE), np.float32)  # a matrix unit reads more rows than asked for
                more[: len(x_RM)] = x_RM
                x_RM = (more.view(np.uint32) >> 16).astype(np.uint16)[: len(x_RM)]
        if self.dtype is np.uint8:  # without a sign, in quads of inner steps
            quads = (panels_CMW + ZERO_BYTE).astype(np.uint8).reshape(-1, SIZE // 4, 4, gemm.WIDE)
            panels_CMW = np.ascontiguousarray(quads.swapaxes(2, 3)).reshape(panels_CMW.shape)
            high_RM = (x_RM.astype(int) + HIGH_STEP // 2) // HIGH_STEP
            x_UM = np.stack([high_RM, x_RM - HIGH_STEP * high_RM], 1).reshape(-1, SIZE).astype(np.int8)
            row_starts_U = (-ZERO_BYTE * x_UM.sum(1, dtype=int)).astype(np.int32)
            x_RM = x_UM
        out_RN, scales_CW = (
            np.ones((len(row_scales_R), OUTPUTS), np.float32),
            self.scales_N.reshape(-1, gemm.WIDE),
        )
        return out_RN, wide(x_RM, panels_CMW, scales_CW, row_scales_R, row_starts_U, out_RN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_right_and_a_row_knows_no_neighbours(dtype):
    product = Product(dtype)
    alone = np.concatenate([product.of(slice(r, r + 1))[0] for r in range(ROWS)])
    exact = 1 + product.x_RM.astype(float) @ product.w_MN * product.scales_N * product.row_scales_R[:, None]
    np.testing.assert_allclose(alone, exact, rtol=1e-4, atol=1e-2)
    for rows in range(1, ROWS + 1):
        assert np.array_equal(product.of(slice(rows))[0], alone[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_prefetch_what_is_read_next_in_even_shares(dtype):
    product, most = Product(dtype), gemm.WIDE_TALLEST[NUMBERS[from_dtype(np.dtype(dtype))]].rows
    read = product.w_MN.size * np.dtype(dtype).itemsize
    for rows in range(1, ROWS + 1):
        tiles = -(-rows // most)
        lost = read - product.of(slice(rows))[1]
        assert 0 <= lost < tiles * SIZE // K_UNROLL * OUTPUTS // gemm.WIDE, "under a byte an iteration"


def digest() -> str:
    """Of the products' bits. Pairs of bfloat16 are multiplied otherwise where a processor can."""
    found = hashlib.sha256()
    for dtype in (np.float32, np.int8):
        product = Product(dtype)
        found.update(product.of(slice(ROWS))[0])
    width = gemm.PARTS * PART
    out_RW = np.empty((ROWS, width), np.float32)
    paged(product.x_RM, product.w_MN[:, :width].astype(np.float32), out_RW, pages=3)
    found.update(np.ascontiguousarray(out_RW[:, :PART]))
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not simd.X86, reason="this processor has one kind of registers")
def test_the_bits_are_those_of_smaller_registers():
    """As Numba compiles for them when it is told to."""
    code = """
from engine.backends.cpu.simd import REGISTERS
from tests.test_gemm import digest
print(*REGISTERS, digest())
"""
    env = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*map(str, AVX2), digest()]
