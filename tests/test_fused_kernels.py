"""Every other kernel of a device step against its definition in float64: in Triton's interpreter, or on a GPU
if there is one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.exactness import DEVICE, DTYPES, TOLERANCE, close
from tests.pairwise import grid

write = pytest.importorskip("engine.backends.cuda.kernels.rope_kv_write", reason="needs Triton")
fused = pytest.importorskip("engine.backends.cuda.kernels.norm_activation", reason="needs Triton")
thin = pytest.importorskip("engine.backends.cuda.kernels.split_k", reason="needs Triton")
pytestmark = [pytest.mark.usefixtures("bfloat16_products"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


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


@pytest.mark.parametrize(
    ("sizes", "rows", "dtype"), grid([(96, 64), (80, 300), (200, 1000)], [1, 7, 40, 130], DTYPES), ids=str
)
def test_thin_products_and_what_sums_them(sizes, rows, dtype):
    """Parts of a product, by themselves and with the norm that reads them."""
    outputs, inputs = sizes
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype).to(DEVICE) for n in (rows, outputs))
    residual, scale = (
        torch.randn(*n, outputs, generator=generator).to(dtype).to(DEVICE) for n in ((rows,), ())
    )
    parts = thin.split_k_product(x, weight)
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


@pytest.mark.parametrize(
    ("activation", "rows", "dtype"), grid(list(fused.ACTIVATIONS), [1, 40, 70], DTYPES), ids=str
)
def test_thin_gated_product(activation, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 300, generator=generator).to(dtype).to(DEVICE) for n in (rows, 2 * 90))
    gate, up = (x.double() @ weight.double().T / 300**0.5).chunk(2, 1)
    active = (
        torch.nn.functional.silu(gate)
        if activation == "silu"
        else torch.nn.functional.gelu(gate, approximate="tanh")
    )
    close(thin.split_k_gated(x, weight / 300**0.5, activation), active * up, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize(("bias", "dtype"), grid([False, True], DTYPES), ids=str)
def test_pages_get_what_partial_sums_come_to(bias, dtype):
    """As if the product had been whole: what rounds once here is rounded once there."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, tokens = 3, 1, 32, 3
    outputs = (heads + 2 * kv_heads) * dim
    parts = torch.randn(3, tokens, outputs, generator=generator).to(DEVICE)
    bias_N = torch.randn(outputs, generator=generator).to(dtype).to(DEVICE) if bias else None
    whole = parts[0] + parts[1] + parts[2]
    whole = (whole + bias_N.float() if bias else whole).to(dtype)
    angles = tuple(torch.randn(tokens, dim, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    slots = torch.tensor([17, -1, 40], device=DEVICE)
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
