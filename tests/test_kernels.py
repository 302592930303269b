"""Attention's kernels against the textbook in float64: in Triton's interpreter, or on a GPU if there is one.

What no kernel may read is NaN in these tests, and what it must write is NaN before it runs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

from tests.exactness import DEVICE, TOLERANCE, close
from tests.pairwise import grid
from tests.reference import attention

kernels = pytest.importorskip("engine.backends.cuda.kernels.attention", reason="needs Triton")
decode = pytest.importorskip("engine.backends.cuda.kernels.decode_attention", reason="needs Triton")
write = pytest.importorskip("engine.backends.cuda.kernels.rope_kv_write", reason="needs Triton")
pytestmark = [pytest.mark.usefixtures("bfloat16_products"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


class Case:
    """Requests of (computed, new) tokens with random keys and values in random pages; every other page is
    NaN."""

    def __init__(self, requests, page=16, kv_heads=2, groups=3, dim=64, dtype=torch.float32, seed=0):
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return torch.from_numpy(rng.normal(size=shape)).to(dtype).to(DEVICE)

        self.requests, self.page, self.dtype, self.dim = requests, page, dtype, dim
        sizes = [-(-(computed + new) // page) for computed, new in requests]
        ids = rng.permutation(sum(sizes) + 3)
        tables = np.full((len(requests), max(sizes) + 1), 10**6, dtype=np.int32)
        shape = (len(ids), kv_heads, page, dim)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
        self.past, begins, at = [], [0], 0
        for row, ((computed, new), size) in enumerate(zip(requests, sizes, strict=True)):
            tables[row, :size] = ids[at : at + size]
            self.past.append([draw(computed + new, kv_heads, dim) for _ in range(2)])
            for position in range(computed + new):
                page_id, place = ids[at + position // page], position % page
                self.keys[page_id, :, place], self.values[page_id, :, place] = (
                    x[position] for x in self.past[-1]
                )
            begins.append(begins[-1] + new)
            at += size
        self.tables = torch.from_numpy(tables).to(DEVICE)
        self.begins = begins
        self.q = draw(kv_heads * groups, begins[-1], dim).transpose(0, 1)  # strided, as a model hands it over
        self.groups = groups

    def expected(self, scale, window, softcap) -> torch.Tensor:
        """[T, H, D] in float64."""
        return torch.stack([
            attention(
                self.q[self.begins[row] + i],
                *(x[: computed + i + 1].transpose(0, 1) for x in self.past[row]), scale, window, softcap,
            )
            for row, (computed, new) in enumerate(self.requests)
            for i in range(new)
        ])  # fmt: skip

    def ints(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    def chunks(self, scale=0.3, window=None, softcap=None) -> torch.Tensor:
        step = kernels.chunk_tokens(self.groups, self.dim, self.dtype.itemsize)
        tiles = [
            (row, first)
            for row, (begin, end) in enumerate(itertools.pairwise(self.begins))
            for first in range(begin, end, step)
        ]
        return kernels.attend_chunks(
            self.q, self.keys, self.values, self.tables, self.ints(self.begins[:-1]),
            self.ints(self.begins[1:]), self.ints([computed for computed, _ in self.requests]),
            self.ints([*tiles, (-1, 0)]), scale, window, softcap,
            torch.full(self.q.shape, torch.nan, dtype=self.dtype, device=DEVICE),
        )  # fmt: skip

    def rows(self, scale=0.3, window=None, softcap=None, slack=0, **options) -> torch.Tensor:
        lengths = [computed + i + 1 for computed, new in self.requests for i in range(new)]
        owners = [row for row, (_, new) in enumerate(self.requests) for _ in range(new)]
        single = owners == list(range(len(owners)))
        return decode.attend_rows(
            self.q, self.keys, self.values, self.tables, self.ints(lengths), max(lengths) + slack,
            self.ints([0] * 99), scale, window, softcap, None if single else self.ints(owners), **options,
        )  # fmt: skip

    def check(self, scale=0.3, window=None, softcap=None) -> None:
        expected = self.expected(scale, window, softcap)
        for way in (self.chunks, self.rows):
            close(way(scale, window, softcap), expected, TOLERANCE[self.dtype])


# Tiles of five tokens, blocks of 32 positions, splits of 64: several of each, and parts of one.
CHUNKS = [(0, 6), (70, 2), (0, 1), (130, 1)]
OPTIONS = [
    dict(), dict(window=1), dict(window=40), dict(window=1000), dict(softcap=0.8),
    dict(window=33, softcap=1.3),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_the_definition(options):
    Case(CHUNKS, dim=16).check(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_half_precision(dtype):
    case = Case([(65, 3), (20, 50)], dtype=dtype, groups=4)  # 32 tokens a tile
    close(case.chunks(window=40), case.expected(0.3, 40, None), TOLERANCE[dtype])
    Case([(65, 2), (200, 1)], dtype=dtype, groups=4).check()


HEADS = [
    (64, 7, 2), (64, 1, 3), (80, 4, 1), (96, 3, 1), (128, 8, 1), (160, 2, 1), (256, 4, 1), (16, 20, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "groups", "kv_heads", "dtype"),
    [
        pytest.param(*heads, dtype, marks=() if i % 2 == j else pytest.mark.slow)
        for i, heads in enumerate(HEADS)
        for j, dtype in enumerate([torch.float32, torch.float16])
    ],
    ids=str,
)
def test_any_head_size_and_group(dim, groups, kv_heads, dtype):
    Case([(0, 3), (65, 1), (40, 2)], dim=dim, groups=groups, kv_heads=kv_heads, dtype=dtype).check(dim**-0.5)


@pytest.mark.parametrize("page", [1, 3, 4, 64, 256])
def test_any_page_size(page):
    Case([(0, 6), (67, 2)], page=page, kv_heads=1).check()
    Case([(70, 1), (9, 1)], page=page).check(window=20)


@settings(max_examples=settings().max_examples // 2, phases=[Phase.generate])
@given(
    requests=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 7])), min_size=1, max_size=3),
    page=st.sampled_from([1, 2, 16, 50]),
    groups=st.sampled_from([1, 3, 4]),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.floats(0.2, 5),
    seed=st.integers(0, 9),
)
def test_any_step_is_the_definition(requests, page, groups, window, softcap, seed):
    Case(requests, page, 2, groups, 16, seed=seed).check(0.5, window, softcap)


@pytest.mark.parametrize("window", [None, 100])
def test_a_row_has_the_same_bits_in_any_company(window):
    """Its splits depend on its own length alone: not on the number of rows, their lengths, or the grid's
    bound."""
    requests = [(700, 1), (20, 1), (0, 1), (255, 1)]
    everyone = Case(requests, kv_heads=1, dim=16)
    together = everyone.rows(window=window)
    close(together, everyone.expected(0.3, window, None))
    for row in range(len(requests)):
        for slack in (0, 3000):
            alone = Case(requests[row : row + 1], kv_heads=1, dim=16)
            alone.keys, alone.values, alone.tables = (
                everyone.keys,
                everyone.values,
                everyone.tables[row : row + 1],
            )
            alone.q = everyone.q[row : row + 1]
            assert torch.equal(alone.rows(window=window, slack=slack), together[row : row + 1])


def test_long_rows_have_larger_splits_not_more(monkeypatch):
    monkeypatch.setattr(decode, "MAX_SPLITS", 4)
    case = Case([(700, 1), (383, 1), (384, 1), (5, 1)], kv_heads=1, dim=16)
    close(case.rows(split=32), case.expected(0.3, None, None))
    close(case.rows(split=1000), case.expected(0.3, None, None))


@pytest.mark.parametrize(
    ("options", "dim", "page", "dtype"),
    grid(OPTIONS, [16, 20, 64], [1, 5, 16], [torch.float32, torch.float16]), ids=str,
)  # fmt: skip
def test_new_tokens_are_rotated_written_and_attended(options, dim, page, dtype):
    """As the kernel that writes pages does it, bit for bit; a row of nobody writes nothing."""
    case = Case([(64, 1), (0, 1), (130, 1), (15, 1)], page=page, dim=dim, dtype=dtype, kv_heads=2)
    lengths = case.ints([65, 1, 131, 0])
    generator = torch.Generator().manual_seed(1)
    heads = (case.groups + 2) * 2
    parts = torch.randn(3, 4, heads * dim, generator=generator).to(DEVICE)
    bias = torch.randn(heads * dim, generator=generator).to(dtype).to(DEVICE)
    whole = (parts[0] + parts[1] + parts[2] + bias.float()).to(dtype)
    angles = torch.randn(200, dim, generator=generator).to(dtype).to(DEVICE)
    positions, found = torch.tensor([64, 7, 199, 0], device=DEVICE), []
    arrived, how = case.ints([0] * 8), (0.3, options.get("window"), options.get("softcap"))
    slots = [(0, 64), (1, 0), (2, 130)]
    slots = [int(case.tables[row, at // page]) * page + at % page for row, at in slots] + [-1]
    for way in ("apart", "whole", "in parts"):
        keys, values = case.keys.clone(), case.values.clone()
        product = parts if way == "in parts" else whole
        q, k, v = product.unflatten(-1, (-1, dim)).split([2 * case.groups, 2, 2], -2)
        new = decode.NewTokens(k, v, positions, angles, bias if way == "in parts" else None)
        if way == "apart":
            cos_sin, slots_T = angles[positions].chunk(2, 1), torch.tensor(slots, device=DEVICE)
            q, new = write.write_pages(q, k, v, *cos_sin, slots_T, keys, values), None
        rest = case.tables, lengths, 131, arrived, *how
        found.append((decode.attend_rows(q, keys, values, *rest, new=new, ahead=parts), keys, values))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))
    assert bool(found[0][0].isfinite().all())
    assert bool((found[0][0][3] == 0).all())
    assert not arrived.any(), "ready for the next launch"


def test_a_row_of_no_length_is_zero_and_a_tile_of_no_request_writes_nothing():
    case = Case([(3, 1), (8, 1)])
    arrived = case.ints([0] * 4), 0.3
    out = decode.attend_rows(case.q, case.keys, case.values, case.tables, case.ints([0, 9]), 9, *arrived)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    close(out[1], case.expected(0.3, None, None)[1])
    untouched = torch.full(case.q.shape, 7.0, device=DEVICE)
    ones = case.ints([1, 1])
    arguments = (case.tables, ones, ones, ones, case.ints([(-1, 0), (-1, 3)]), 0.3, None, None, untouched)
    assert torch.equal(
        kernels.attend_chunks(case.q, case.keys, case.values, *arguments), torch.full_like(untouched, 7)
    )


def test_nan_stays_with_its_request():
    case = Case([(20, 1), (30, 5), (7, 1)])
    case.keys[case.tables[1, 0], 1, 3] = torch.nan
    expected = case.expected(0.3, None, None)
    for out in (case.chunks(), case.rows()):
        assert bool(out[1:6, 3:].isnan().all()), "all heads of its second KV head"
        kept = [0, 6]
        close(out[kept], expected[kept])
        close(out[1:6, :3], expected[1:6, :3])


@pytest.mark.slow
def test_the_compiler_takes_every_kernel_and_none_spills(tmp_path):
    """For sm_90, with or without a GPU: the interpreter runs what the compiler refuses."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "_write",
        "_chunks",
        "_rows",
        "_row",
        "_split_k",
        "_inputs",
        "_norm",
        "_gated",
        "_best_of_part",
        "_best_of_row",
    ):
        assert f"{name} " in done.stdout
