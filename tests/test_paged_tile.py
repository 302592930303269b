"""Attention's products over pages: what they give, wherever pages and their parts lie, and what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit, types

from engine.backends.cpu import gemm
from engine.backends.cpu.paged_tile import PART
from engine.backends.cpu.vector_math import address
from tests.pairwise import grid
from tests.test_cpu import compiled_decoder, random_model


@njit
def multiply_pages(x_RM, parts_XIKP, pages_XI, offset, out_RW, add):
    pages, _, size, width = parts_XIKP.shape
    item, x_item = parts_XIKP.itemsize, x_RM.itemsize
    gemm.multiply_paged(
        len(x_RM), parts_XIKP.dtype, address(x_RM), x_item * x_RM.shape[1], x_item * size, address(pages_XI),
        offset, pages, item * width, size, address(out_RW), 4 * out_RW.shape[1], add, address(pages_XI),
    )  # fmt: skip


def upper_halves(x):
    """The bits of bfloat16 numbers that are float32."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def paged(x_RM, w_MW, out_RW, pages=1, add=0, dtype=np.float32):
    """Multiply x by w, whose rows are in so many pages and whose columns in parts, in no order.

    As uint16 both are bfloat16, w in pairs of rows, and x where such pairs are multiplied.
    """
    parts_XIKP = w_MW.reshape(pages, -1, gemm.PARTS, PART).transpose(0, 2, 1, 3)[::-1, ::-1].copy()
    if dtype is np.uint16:
        pairs = upper_halves(parts_XIKP).reshape(pages, gemm.PARTS, -1, 2, PART).swapaxes(3, 4)
        parts_XIKP = np.ascontiguousarray(pairs).reshape(parts_XIKP.shape)
        x_RM = upper_halves(x_RM) if gemm.x_item_of(gemm.NUMBERS[types.uint16]) == 2 else x_RM
    places = parts_XIKP.ctypes.data + parts_XIKP[0, 0].nbytes * np.arange(pages * gemm.PARTS)[::-1]
    multiply_pages(x_RM, parts_XIKP, places.reshape(pages, -1) - 64, 64, out_RW, add)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_pages_are_multiplied_wherever_their_parts_lie(dtype):
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=size).astype(np.float32) for size in ((60, gemm.PARTS * PART), (20, 60)))
    if dtype is np.uint16:  # only numbers that it has
        w, x = ((one.view(np.uint32) & 0xFFFF0000).view(np.float32) for one in (w, x))
    for pages, add in ((1, 0), (3, 0), (5, 1)):  # of 60, 20 and 12 inner steps
        before = rng.normal(size=(20, w.shape[1])).astype(np.float32)
        alone = before.copy()
        for r in range(20):
            paged(x[r : r + 1], w, alone[r : r + 1], pages, add, dtype)
        np.testing.assert_allclose(alone, x.astype(float) @ w + before * add, rtol=1e-5, atol=1e-5)
        for rows in range(20):
            out = before.copy()
            paged(x[:rows], w, out[:rows], pages, add, dtype)
            assert np.array_equal(out, np.concatenate([alone[:rows], before[rows:]]))


@pytest.mark.parametrize("kv", [torch.float32, torch.uint16])
@pytest.mark.parametrize(("page", "head"), grid([1, 5, 48], [16, 48, 80]))
def test_pages_lie_in_memory_that_goes_on_behind_them(page, head, kv):
    """By as much as is read beyond a page's last row of keys, and beyond its last dimensions of values."""
    packed = compiled_decoder(random_model(head_dim=head), page)
    packed._kv_dtype = kv
    packed.allocate_kv(1)
    keys, values = packed.keys_LXKDPI, packed.values_LXKBPVI
    assert keys.base.nbytes - keys.nbytes >= 4 * PART
    assert values.base.nbytes - values.nbytes >= (gemm.PARTS - 1) * values[0, 0, 0, 0].nbytes
