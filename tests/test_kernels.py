"""Every kernel against its definition in float64: in Triton's interpreter, or on the GPU where there is one.

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

kernels = pytest.importorskip("engine.attention.kernels", reason="needs Triton")
write = pytest.importorskip("engine.attention.write", reason="needs Triton")
fused = pytest.importorskip("engine.runner.fused", reason="needs Triton")
thin = pytest.importorskip("engine.runner.thin", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
# ‖found - expected‖ / ‖expected‖: rounding of the result, and of the weights before the second product.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch):
    """The interpreter holds bfloat16 as 16-bit integers and multiplies these as such: give its products
    floats."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    scale = expected.norm().clamp(min=1e-6)
    assert float((found - expected).norm() / scale) <= (tolerance or TOLERANCE[torch.float32])


def definition(q_HD, k_CKD, v_CKD, scale, window, softcap, sink_H) -> torch.Tensor:
    """Attention of the last of C positions in float64, [H, D]."""
    groups = q_HD.shape[0] // k_CKD.shape[1]
    k_CHD, v_CHD = (
        x.double().repeat_interleave(groups, 1)[-window if window else None :] for x in (k_CKD, v_CKD)
    )
    scores_HC = torch.einsum("hd,chd->hc", q_HD.double(), k_CHD) * scale
    if softcap is not None:
        scores_HC = softcap * torch.tanh(scores_HC / softcap)
    if sink_H is not None:
        scores_HC = torch.cat([scores_HC, sink_H.double()[:, None]], 1)
    weights_HC = scores_HC.softmax(-1)[:, : len(k_CHD)]
    return torch.einsum("hc,chd->hd", weights_HC, v_CHD)


class Case:
    """Requests of (computed, new) tokens with random keys and values in random pages; every other page is
    NaN."""

    def __init__(
        self, requests, page=16, kv_heads=2, groups=3, dim=64, dtype=torch.float32, seed=0, sinks=False
    ):
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
        self.sinks = draw(kv_heads * groups).float() if sinks else None
        self.groups = groups

    def expected(self, scale, window, softcap) -> torch.Tensor:
        """[T, H, D] in float64."""
        return torch.stack([
            definition(
                self.q[self.begins[row] + i], *(x[: computed + i + 1] for x in self.past[row]), scale,
                window, softcap, self.sinks,
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
            self.ints([*tiles, (-1, 0)]), scale, window, softcap, self.sinks,
            torch.full(self.q.shape, torch.nan, dtype=self.dtype, device=DEVICE),
        )  # fmt: skip

    def rows(self, scale=0.3, window=None, softcap=None, slack=0, **options) -> torch.Tensor:
        lengths = [computed + i + 1 for computed, new in self.requests for i in range(new)]
        owners = [row for row, (_, new) in enumerate(self.requests) for _ in range(new)]
        single = owners == list(range(len(owners)))
        return kernels.attend_rows(
            self.q, self.keys, self.values, self.tables, self.ints(lengths), max(lengths) + slack, scale,
            window, softcap, self.sinks, None if single else self.ints(owners), **options,
        )  # fmt: skip

    def check(self, scale=0.3, window=None, softcap=None) -> None:
        expected = self.expected(scale, window, softcap)
        for way in (self.chunks, self.rows):
            close(way(scale, window, softcap), expected, TOLERANCE[self.dtype])


CHUNKS = [(0, 9), (70, 5), (33, 1), (0, 1), (130, 3)]
OPTIONS = [
    dict(), dict(window=1), dict(window=40), dict(window=1000), dict(softcap=0.8),
    dict(window=33, softcap=1.3),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_the_definition(options):
    Case(CHUNKS, dim=16, sinks=options.get("window") == 33).check(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_half_precision(dtype):
    case = Case([(65, 3), (20, 50)], dtype=dtype, groups=4)  # 32 tokens a tile
    close(case.chunks(window=40), case.expected(0.3, 40, None), TOLERANCE[dtype])
    Case([(65, 2), (200, 1)], dtype=dtype, groups=4, sinks=True).check()


@pytest.mark.parametrize(("dim", "groups", "kv_heads"), [
    (64, 7, 2), (64, 1, 3), (80, 4, 1), (96, 3, 1), (128, 8, 1), (160, 2, 1), (256, 4, 1), (16, 20, 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_head_size_and_group(dim, groups, kv_heads, dtype):
    Case([(0, 3), (65, 1), (40, 2)], dim=dim, groups=groups, kv_heads=kv_heads, dtype=dtype).check(dim**-0.5)


@pytest.mark.parametrize("page", [1, 3, 4, 64, 256])
def test_any_page_size(page):
    Case([(0, 6), (67, 4), (31, 1)], page=page).check()
    Case([(70, 1), (9, 1)], page=page, sinks=True).check(window=20)


@settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.generate])
@given(
    requests=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 12])), min_size=1, max_size=4),
    page=st.sampled_from([1, 2, 16, 50]),
    groups=st.sampled_from([1, 3, 4]),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.floats(0.2, 5),
    sinks=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_step_is_the_definition(requests, page, groups, window, softcap, sinks, seed):
    Case(requests, page, 2, groups, 16, seed=seed, sinks=sinks).check(0.5, window, softcap)


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
    monkeypatch.setattr(kernels, "MAX_SPLITS", 4)
    for options in (dict(), dict(sinks=True)):
        case = Case([(700, 1), (383, 1), (384, 1), (5, 1)], kv_heads=1, dim=16, **options)
        close(case.rows(split=32), case.expected(0.3, None, None))
        close(case.rows(split=1000), case.expected(0.3, None, None))


def test_a_row_of_no_length_is_zero_and_a_tile_of_no_request_writes_nothing():
    case = Case([(3, 1), (8, 1)])
    out = kernels.attend_rows(case.q, case.keys, case.values, case.tables, case.ints([0, 9]), 9, 0.3)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    close(out[1], case.expected(0.3, None, None)[1])
    untouched = torch.full(case.q.shape, 7.0, device=DEVICE)
    ones = case.ints([1, 1])
    arguments = (
        case.tables,
        ones,
        ones,
        ones,
        case.ints([(-1, 0), (-1, 3)]),
        0.3,
        None,
        None,
        None,
        untouched,
    )
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


@pytest.mark.parametrize(("tokens", "dim", "rotated", "dtype"), [
    *itertools.product([1, 7], [16], [0, 16], DTYPES), (7, 12, 12, torch.float32), (7, 20, 8, torch.float32),
    (515, 16, 0, torch.float32), (515, 20, 8, torch.float32),
], ids=str)  # fmt: skip
def test_pages_get_keys_and_values_where_the_slots_say(dim, rotated, tokens, dtype):
    """As views of one joined product, rotated as transformers does it; a negative slot is written nowhere."""
    heads, kv_heads, page = (3, 2, 5) if tokens < 100 else (1, 1, 16)
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype).to(DEVICE)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (part.unflatten(1, (-1, dim)) for part in joined.split(sizes, 1))
    slots = torch.randperm(2 * tokens + page, generator=generator)[:tokens]
    slots[tokens // 2 :: 4] = -1
    pages = -(-(2 * tokens + page) // page)
    keys, values = (
        torch.full((pages, kv_heads, page, dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)
    )
    rope, turned = None, [q, k]
    if rotated:
        angles = torch.randn(tokens, rotated // 2, generator=generator).to(DEVICE).repeat(1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        rope = (q, cos, sin)

        def turn(x):
            x, rest = x.double().split([rotated, dim - rotated], -1)
            first, second = x.chunk(2, -1)
            return torch.cat([x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None], rest], -1)

        turned = [turn(q), turn(k)]
    out = write.write_pages(k, v, slots.to(DEVICE), keys, values, rope)
    if rope is None:
        assert out is None
    else:
        close(out, turned[0], TOLERANCE[dtype])
    kept = slots >= 0
    for store, new, tolerance in ((keys, turned[1], TOLERANCE[dtype]), (values, v, 1e-30)):
        flat = store.transpose(1, 2).flatten(0, 1)
        close(flat[slots[kept]], new[kept], tolerance)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots[kept]] = False
        assert bool((flat[others] == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("size", "plus_one"), [(64, False), (896, True), (1000, False)])
def test_norm_of_a_sum_and_the_sum(size, plus_one, add, dtype):
    x, residual = (
        torch.randn(5, size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)
    )
    weight = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(dtype)
    total = x + residual if add else x
    wide = total.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + plus_one)
    residual = residual.to(DEVICE)
    found = fused.add_rms_norm(x.to(DEVICE), residual if add else None, weight.to(DEVICE), 1e-5, plus_one)
    close(found, expected, TOLERANCE[dtype])
    # the interpreter cuts bfloat16 off, unrounded
    if add and (dtype is not torch.bfloat16 or DEVICE == "cuda"):
        assert torch.equal(residual.cpu(), total), "the residual is the model's own sum, bit for bit"


@pytest.mark.parametrize(
    ("heads", "order"), [(3, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (3, (0, 2, 1, 3))], ids=str
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_norm_of_heads_in_a_joined_product(tokens, heads, order):
    """As models hand them over: [1, T, H, D] or [1, H, T, D], strided; one head of several tokens looks like
    rows."""
    joined = torch.randn(1, tokens, (heads + 2) * 32, generator=torch.Generator().manual_seed(0))
    x = joined[..., 32 : (heads + 1) * 32].unflatten(-1, (heads, 32)).permute(order)
    found = fused.add_rms_norm(x.to(DEVICE), None, torch.ones(32, device=DEVICE), 1e-5)
    close(found, x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (80, 300), (200, 1000)])
def test_thin_products_and_what_sums_them(outputs, inputs, rows, dtype):
    """Parts of a product, by themselves and with the norm that reads them."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype).to(DEVICE) for n in (rows, outputs))
    residual, scale = (
        torch.randn(*n, outputs, generator=generator).to(dtype).to(DEVICE) for n in ((rows,), ())
    )
    parts = thin.thin_product(x, weight)
    assert parts.dtype == torch.float32
    exact = x.double() @ weight.double().T
    close(parts.double().sum(0), exact, 5e-6)
    total = exact + residual.double()
    found = fused.add_rms_norm(parts, residual, scale, 1e-5, summed=True)
    assert found.dtype == dtype
    close(
        found,
        total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale.double(),
        2 * TOLERANCE[dtype],
    )
    close(residual, total, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40, 70])
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_thin_gated_product(activation, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 300, generator=generator).to(dtype).to(DEVICE) for n in (rows, 2 * 90))
    gate, up = (x.double() @ weight.double().T / 300**0.5).chunk(2, 1)
    active = (
        torch.nn.functional.silu(gate)
        if activation == "silu"
        else torch.nn.functional.gelu(gate, approximate="tanh")
    )
    close(thin.thin_gated(x, weight / 300**0.5, activation), active * up, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_pages_get_what_partial_sums_come_to(bias, dtype):
    """As if the product had been whole: what rounds once here is rounded once there."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, tokens = 3, 2, 32, 5
    outputs = (heads + 2 * kv_heads) * dim
    parts = torch.randn(3, tokens, outputs, generator=generator).to(DEVICE)
    bias_N = torch.randn(outputs, generator=generator).to(dtype).to(DEVICE) if bias else None
    whole = parts[0] + parts[1] + parts[2]
    whole = (whole + bias_N.float() if bias else whole).to(dtype)
    angles = tuple(torch.randn(tokens, dim, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    slots = torch.tensor([3, 17, -1, 40, 0], device=DEVICE)
    found = []
    for joined in (parts, whole):
        q, k, v = joined.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], -2)
        stores = [torch.full((3, kv_heads, 16, dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
        out = write.write_pages(k, v, slots, *stores, (q, *angles), bias_N if joined is parts else None)
        assert out.dtype == dtype
        found.append((out, *stores))
    for summed, expected in zip(*found, strict=True):
        close(summed, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gated_activation(activation, dtype):
    joined = (3 * torch.randn(4, 2 * 1100, generator=torch.Generator().manual_seed(0))).to(dtype).to(DEVICE)
    joined[0, :2] = torch.tensor([80.0, -80.0])
    gate, up = joined.split(1100, 1)
    wide = gate.double()
    silu = torch.nn.functional.silu(wide)
    active = silu if activation == "silu" else torch.nn.functional.gelu(wide, approximate="tanh")
    close(fused.gated(gate, up, activation), active * up.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_tokens_are_the_first_largest_and_unsound_rows_have_none(dtype):
    vocabulary = 2 * fused.PART + 77
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = logits.argmax(-1)
    for row, places in ((1, (5, vocabulary - 1)), (2, (fused.PART - 1, fused.PART)), (3, (vocabulary - 1,))):
        logits[row, list(places)] = 50.0
        expected[row] = places[0]
    logits[4, vocabulary - 1], logits[5, 3], logits[6], logits[7, 9] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    expected[4:7] = -1
    padded = torch.full((9, vocabulary + 3), 99.0, dtype=dtype)
    padded[:, :vocabulary] = logits
    found = fused.best_tokens(padded.to(DEVICE)[:, :vocabulary])
    assert found.tolist() == expected.tolist()
    assert found.dtype == torch.int64


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_inputs_of_a_step(tokens):
    rng = np.random.default_rng(tokens)
    last, tables = (
        torch.from_numpy(rng.integers(-1, 99, 40)),
        torch.from_numpy(rng.integers(0, 50, (6, 7))).int(),
    )
    at = rng.integers(-1, 7 * 16, tokens)
    inputs = torch.from_numpy(np.stack([rng.integers(-40, 99, tokens), at, rng.integers(0, 6, tokens)])).int()
    found = fused.step_inputs(inputs.to(DEVICE), last.to(DEVICE), tables.to(DEVICE), 16)
    for t, (said, position, line) in enumerate(inputs.T.tolist()):
        token = max(0, int(last[-1 - said]) if said < 0 else said)
        slot = int(tables[line, position // 16]) * 16 + position % 16 if position >= 0 else -1
        assert [int(x[t]) for x in found] == [token, max(0, position), slot, position + 1]


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
        "_combine",
        "_inputs",
        "_norm",
        "_gated",
        "_best_of_part",
        "_best_of_row",
        "_thin",
    ):
        assert f"{name} " in done.stdout
