"""Every other kernel of a device step against its definition in float64: in Triton's interpreter, or on a GPU
if there is one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from engine.models.decoder_parts import ACTIVATIONS, Norm
from tests.exactness import DEVICE, DTYPES, TOLERANCE, close
from tests.pairwise import grid

write = pytest.importorskip("engine.backends.cuda.kernels.rope_kv_write", reason="needs Triton")
fused = pytest.importorskip("engine.backends.cuda.kernels.norm_activation", reason="needs Triton")
one = pytest.importorskip("engine.backends.cuda.kernels.one_row", reason="needs Triton")
split = pytest.importorskip("engine.backends.cuda.kernels.split_k", reason="needs Triton")
pytestmark = [pytest.mark.usefixtures("bfloat16_products"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize(("tokens", "dim", "dtype"), [
    *itertools.product([1, 7], [16], DTYPES), (7, 12, torch.float32), (515, 20, torch.float32),
], ids=str)  # fmt: skip
def test_pages_get_keys_and_values_where_the_slots_say(dim, tokens, dtype):
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
    angles = torch.randn(tokens, dim // 2, generator=generator).to(DEVICE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotated(x):
        first, second = x.double().chunk(2, -1)
        both = cos[:, None].repeat(1, 1, 2), sin[:, None].repeat(1, 1, 2)
        return x.double() * both[0] + torch.cat([-second, first], -1) * both[1]

    out = write.write_pages(q, k, v, cos, sin, slots.to(DEVICE), keys, values)
    close(out, rotated(q), TOLERANCE[dtype])
    kept = slots >= 0
    for store, new, tolerance in ((keys, rotated(k), TOLERANCE[dtype]), (values, v, 1e-30)):
        flat = store.transpose(1, 2).flatten(0, 1)
        close(flat[slots[kept]], new[kept], tolerance)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots[kept]] = False
        assert bool((flat[others] == 7.0).all())


def expected_norm(x: torch.Tensor, by: Norm) -> torch.Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if by.centred else x
    x = x * (x.square().mean(-1, keepdim=True) + by.eps).rsqrt() * by.scale.double().cpu()
    return x if by.bias is None else x + by.bias.double().cpu()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("size", "centred", "scale"), [(64, False, 1.0), (896, True, 1.0), (1000, False, 0.25)]
)
def test_norm_of_a_sum_and_the_sum(size, centred, scale, add, dtype):
    x, residual = draw(5, size, dtype=dtype), draw(5, size, seed=1, dtype=dtype)
    bias = draw(size, seed=3, dtype=dtype).to(DEVICE) if centred else None
    by = Norm(draw(size, seed=2, dtype=dtype).to(DEVICE), bias, 1e-5, centred)
    total = (scale * x.float() + residual.float()).to(dtype) if add else x
    expected, residual = expected_norm(total, by), residual.to(DEVICE)
    found = fused.add_norm(residual, x.to(DEVICE), by, scale) if add else fused.norm(x.to(DEVICE), by)
    close(found, expected, TOLERANCE[dtype])
    assert found.dtype == dtype
    # the interpreter cuts bfloat16 off, unrounded
    if add and (dtype is not torch.bfloat16 or DEVICE == "cuda"):
        assert torch.equal(residual.cpu(), total), "the residual is the model's own sum, bit for bit"


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5])
def test_norm_of_heads_in_a_joined_product(tokens, heads, each):
    """With one weight for all heads, or one for each, that is wider than the heads' own type."""
    x = draw(tokens, heads + 2, 32, dtype=torch.float16)[:, 1 : heads + 1]
    by = Norm(draw(*([heads] if each else []), 32, seed=1).to(DEVICE), None, 1e-5, True)
    found = fused.norm(x.to(DEVICE), by)
    close(found, expected_norm(x, by), TOLERANCE[torch.float16])
    assert found.is_contiguous()
    assert found.dtype == torch.float16


@pytest.mark.parametrize(
    ("sizes", "rows", "dtype"), grid([(96, 64), (80, 300), (200, 1000)], [1, 7, 40, 130], DTYPES), ids=str
)
def test_split_products_and_what_sums_them(sizes, rows, dtype):
    """Parts of a product, by themselves and with the norm that reads them."""
    outputs, inputs = sizes
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype).to(DEVICE) for n in (rows, outputs))
    residual, scale = (
        torch.randn(*n, outputs, generator=generator).to(dtype).to(DEVICE) for n in ((rows,), ())
    )
    parts = split.split_k_product(x, weight, ahead=weight)
    assert parts.dtype == torch.float32
    exact = x.double() @ weight.double().T
    close(parts.double().sum(0), exact, 5e-6)
    total = exact + residual.double()
    by = Norm(scale, None, 1e-5, False)
    found = fused.norm(parts, by, dtype)
    assert found.dtype == dtype
    close(found, expected_norm(exact.cpu(), by), 2 * TOLERANCE[dtype])
    found = fused.add_norm(residual, parts, by)
    assert found.dtype == dtype
    close(found, expected_norm(total.cpu(), by), 2 * TOLERANCE[dtype])
    close(residual, total, TOLERANCE[dtype])


def rows_of(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows, a weight and a residual stream, such that products are of the rows' own size."""
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, weight, residual = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [each.to(dtype).to(DEVICE) for each in (x, weight / inputs**0.5, residual)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(96, 64), (44, 300), (74, 2100)], ids=str)
@pytest.mark.parametrize("parts", [0, 1, 5])
def test_products_of_a_row_that_is_normed_or_yet_to_be(sizes, dtype, parts):
    outputs, inputs = sizes
    x, weight, _ = rows_of(1, outputs, inputs, dtype)
    bias = draw(outputs, seed=4, dtype=dtype).to(DEVICE) if parts != 1 else None
    unnormed, expected = None, x.cpu()
    if parts:
        by = Norm(draw(inputs, seed=5).to(DEVICE), None, 1e-5, False)
        squares = torch.stack([part.float().square().sum() for part in x.tensor_split(parts, 1)])
        unnormed, expected = one.Unnormed(by, squares), expected_norm(expected, by)
    exact = expected.double() @ weight.double().cpu().T
    found = one.row_product(x, weight, bias, unnormed, ahead=weight)
    assert found.dtype == dtype
    close(found, exact if bias is None else exact + bias.double().cpu(), 3 * TOLERANCE[dtype])
    gate, up = exact.chunk(2, 1)
    for name, activation in ACTIVATIONS.items():
        found = one.gated_row_product(x, weight, name, unnormed)
        close(found, activation(gate) * up, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(96, 64), (74, 2100)], ids=str)
def test_a_product_of_a_row_adds_itself_to_the_residual_stream(sizes, dtype):
    x, weight, residual = rows_of(1, *sizes, dtype)
    total = 0.25 * (x.double() @ weight.double().T) + residual.double()
    squares = one.add_row_product(residual, x, weight, 0.25)
    close(residual, total, 2 * TOLERANCE[dtype])
    close(squares.sum(), residual.double().square().sum(), 1e-6)


@pytest.mark.parametrize(
    ("activation", "rows", "dtype"), grid(list(ACTIVATIONS), [1, 40, 70], DTYPES), ids=str
)
def test_split_gated_product(activation, rows, dtype):
    x, weight, _ = rows_of(rows, 2 * 90, 300, dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, 1)
    active = ACTIVATIONS[activation](gate)
    close(split.split_k_gated(x, weight, activation), active * up, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
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
