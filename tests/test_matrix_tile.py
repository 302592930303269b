"""Tiles of a matrix unit: what an emulation of its instructions computes, and the code for a processor of its
kind.

Nothing here needs one; where there is one, tests/test_gemm.py runs the instructions themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from engine.backends.cpu import matrix_tile
from engine.backends.cpu.gemm import WIDE_TILES
from engine.backends.cpu.matrix_tile import ROWS, STEPS, emit_matrix_tile
from engine.backends.cpu.simd import AVX512, REGISTERS
from engine.backends.cpu.tile import TILED
from tests.test_gemm import functions, loop, machine_code

SHAPES = [WIDE_TILES[AVX512]._replace(rows=rows) for rows in (ROWS, 2 * ROWS)]
BYTE, POINTER, WORD = ctypes.c_uint8, ctypes.c_void_p, ctypes.c_int64
TAKES = {
    "ldtilecfg": (POINTER,), "tilezero": (BYTE,), "tileloadd64": (BYTE, POINTER, WORD),
    "tdpbf16ps": (BYTE, BYTE, BYTE), "tilestored64": (BYTE, POINTER, WORD), "tilerelease": (),
}  # fmt: skip


class Unit:
    """The instructions, as the manual has them: registers of so many rows and bytes, configured first."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.tiles = np.zeros((8, 16, 64), np.uint8)
        self.log: list[str] = []

    def ldtilecfg(self, address: int) -> None:
        config = bytes((ctypes.c_uint8 * 64).from_address(address))
        assert (config[0], config[1]) == (1, 0), "palette, start row"
        assert not any(config[2:16]), "reserved"
        assert not any(config[32:48]), "reserved"
        assert not any(config[56:]), "reserved"
        self.columns = [int.from_bytes(config[16 + 2 * t : 18 + 2 * t], "little") for t in range(8)]
        self.rows = list(config[48:56])
        assert max(self.rows) <= 16
        assert max(self.columns) <= 64
        self.tiles[:] = 0

    def _row(self, tile: int, address: int, stride: int, row: int) -> ctypes.Array:
        return (ctypes.c_uint8 * self.columns[tile]).from_address(address + row * stride)

    def tilezero(self, tile: int) -> None:
        self.tiles[tile] = 0

    def tileloadd64(self, tile: int, address: int, stride: int) -> None:
        self.tiles[tile] = 0
        for row in range(self.rows[tile]):
            self.tiles[tile, row, : self.columns[tile]] = self._row(tile, address, stride, row)

    def tilestored64(self, tile: int, address: int, stride: int) -> None:
        for row in range(self.rows[tile]):
            self._row(tile, address, stride, row)[:] = self.tiles[tile, row, : self.columns[tile]].tolist()

    def tdpbf16ps(self, sums: int, x: int, w: int) -> None:
        assert self.rows[sums] == self.rows[x]
        assert self.columns[sums] == self.columns[w]
        assert self.columns[x] == 4 * self.rows[w], "as many pairs"
        total = self.tiles[sums].view(np.float32)
        pairs_x, pairs_w = (widened(self.tiles[tile].view(np.uint16)).reshape(16, 16, 2) for tile in (x, w))
        for k in range(self.rows[w]):
            for half in range(2):
                total += pairs_x[:, k, half, None] * pairs_w[k, :, half]
        assert not total[self.rows[sums] :].any()

    def tilerelease(self) -> None:
        self.rows, self.columns = [], []


def widened(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def emulated() -> Iterator[dict[int, int]]:
    """Addresses of the functions, by their tile's rows, with the instructions emulated."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    unit, kept = Unit(), []
    for name, takes in TAKES.items():
        kept.append(ctypes.CFUNCTYPE(None, *takes)(getattr(unit, name)))
        llvm.add_symbol(f"emulated_{name}", ctypes.cast(kept[-1], ctypes.c_void_p).value)
    module = ir.Module()
    for shape in SHAPES:
        emit_matrix_tile(ir.Function(module, matrix_tile.SIGNATURE, f"of_{shape.rows}"), shape, "emulated_")
    target = llvm.Target.from_default_triple().create_target_machine(
        llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), codemodel="jitdefault", jit=True
    )
    jit = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), target)
    jit.finalize_object()
    yield {shape.rows: jit.get_function_address(f"of_{shape.rows}") for shape in SHAPES}
    del jit, kept


def bfloat16(rng: np.random.Generator, *sizes: int) -> np.ndarray:
    return (rng.normal(size=sizes).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.skipif(REGISTERS != AVX512, reason="its vectors are those of AVX-512")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32])
def test_products_are_those_of_the_numbers(emulated, rows, scaled):
    rng = np.random.default_rng(rows)
    tile = next(shape for shape in SHAPES if rows <= shape.rows)
    size, width, out_width = 3 * STEPS, tile.width, tile.width + 7
    x_RM, w_MN = bfloat16(rng, tile.rows, size + 6), bfloat16(rng, size, width)
    x_RM[rows:] = 0x7FC0  # NaN, of rows that nobody asked for
    pairs = np.ascontiguousarray(w_MN.reshape(-1, 2, width).swapaxes(1, 2))
    out_RN = rng.normal(size=(tile.rows, out_width)).astype(np.float32)
    row_scales_R, scales_N = (rng.random(count).astype(np.float32) for count in (tile.rows, width))
    before = out_RN.copy()
    call = ctypes.CFUNCTYPE(WORD, *[WORD] * 14)(emulated[tile.rows])
    prefetched = call(
        rows, x_RM.ctypes.data, 2 * x_RM.shape[1], pairs.ctypes.data, 2 * width, size, out_RN.ctypes.data,
        4 * out_width, row_scales_R.ctypes.data if scaled else 0, 0, scales_N.ctypes.data if scaled else 0,
        int(scaled), w_MN.ctypes.data, 2,
    )  # fmt: skip
    exact = widened(x_RM[:rows, :size]).astype(float) @ widened(w_MN)
    if scaled:
        exact = before[:rows, :width] + exact * row_scales_R[:rows, None] * scales_N
    np.testing.assert_allclose(out_RN[:rows, :width], exact, rtol=1e-4, atol=1e-4)
    assert np.array_equal(out_RN[rows:], before[rows:])
    assert np.array_equal(out_RN[:, width:], before[:, width:])
    assert prefetched == w_MN.nbytes // 2


@pytest.mark.skipif(REGISTERS != AVX512, reason="its vectors are those of AVX-512")
def test_a_row_knows_no_neighbours(emulated):
    """Whichever of the two functions computes it."""
    rng = np.random.default_rng(0)
    size, width = 2 * STEPS, SHAPES[0].width
    x_RM, w_MN = bfloat16(rng, 2 * ROWS, size), bfloat16(rng, size, width)
    found = []
    for rows, of in ((1, ROWS), (9, ROWS), (ROWS, ROWS), (ROWS + 1, 2 * ROWS), (2 * ROWS, 2 * ROWS)):
        out_RN = np.zeros((2 * ROWS, width), np.float32)
        ctypes.CFUNCTYPE(WORD, *[WORD] * 14)(emulated[of])(
            rows, x_RM.ctypes.data, 2 * size, w_MN.ctypes.data, 2 * width, size, out_RN.ctypes.data,
            4 * width, 0, 0, 0, 0, w_MN.ctypes.data, 1,
        )  # fmt: skip
        found.append(out_RN[0])
    assert all(np.array_equal(row, found[0]) for row in found)


def test_a_processor_with_the_unit_gets_its_instructions_and_no_sum_is_on_the_stack():
    module = ir.Module()
    for shape in SHAPES:
        emit_matrix_tile(ir.Function(module, matrix_tile.SIGNATURE, shape.name(TILED)), shape)
    found = functions(machine_code("x86_64-unknown-linux-gnu", "sapphirerapids", module))
    for shape in SHAPES:
        lines = found[shape.name(TILED)]
        halves = shape.rows // ROWS
        products = [line for line in loop(lines) if line.startswith("tdpbf16ps")]
        assert len(products) in (3 * halves, 6 * halves), "of one iteration, or two"
        first = lines.index(next(line for line in lines if line.startswith("ldtilecfg")))
        assert any(line.startswith("tilerelease") for line in lines[first:])
        inner = lines[lines.index(products[0]) : lines.index(products[-1])]
        assert not [line for line in inner if "rsp" in line], inner
