"""Products: every way gives what F.linear gives, and the choice is kept."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from engine.backends import gemm_tuner as ways
from engine.backends.fused_linear import TILE, FusedLinear, prepare


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64, 130])
@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_is_a_linear_layer(name, rows, bias):
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(40, 24, generator=generator), torch.randn(rows, 24, generator=generator)
    b = torch.randn(40, generator=generator) if bias else None
    out = ways.WAYS[name](weight)(x, b)
    torch.testing.assert_close(out, F.linear(x, weight, b), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(), "whoever takes it may view it"


def test_ways_are_measured_once_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(ways, "TOY", 0)
    monkeypatch.setattr(ways, "COLD", 1e3)
    weight = torch.randn(48, 32)
    first = ways.choose([lambda: weight])
    assert [most for most, _ in first] == list(ways.ROWS)
    assert {name for _, name in first} <= ways.WAYS.keys()
    kept = json.loads((tmp_path / "linear.json").read_text())
    assert [key.rpartition(" | ")[2] for key in kept] == ["48x32"]

    monkeypatch.setattr(ways, "fastest_ways", lambda *given: pytest.fail("measured again"))
    assert ways.choose([lambda: weight]) == first
    (tmp_path / "linear.json").write_text("{broken")
    monkeypatch.setattr(ways, "fastest_ways", lambda *given: ["plain"] * 3)
    assert ways.choose([lambda: weight]) == list(zip(ways.ROWS, ["plain"] * 3, strict=False))


def test_a_product_takes_the_way_of_its_rows_and_the_last_beyond(monkeypatch):
    taken = []
    for name in ("plain", "left"):
        monkeypatch.setitem(
            ways.WAYS,
            name,
            lambda weight, name=name: lambda x, b: taken.append(name) or F.linear(x, weight, b),
        )
    monkeypatch.setattr("engine.backends.fused_linear.choose", lambda weights: [(2, "plain"), (8, "left")])
    weights = [torch.nn.Parameter(torch.randn(n, 6), requires_grad=False) for n in (3, 5)]
    biases = [torch.randn(3), torch.randn(5)]
    product = FusedLinear(weights, biases)
    assert prepare([product]) == 0, "nothing was packed"
    for rows in (1, 2, 3, 8, 99):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(product(x), F.linear(x, torch.cat([*weights]), torch.cat(biases)))
    assert taken == ["plain", "plain", "left", "left", "left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiled_row_has_the_same_bits_in_any_company(dtype):
    product = FusedLinear([torch.randn(40, 24, dtype=dtype)], [], tiled=True)
    prepare([product])
    x = torch.randn(3 * TILE + 5, 24, dtype=dtype)
    whole = product(x)
    assert whole.shape == (len(x), 40)
    for at in (0, 7, TILE, 3 * TILE + 4):
        assert torch.equal(product(x[at : at + 1])[0], whole[at])
        assert torch.equal(product(x[at:])[0], whole[at])
