"""Products: every way gives what F.linear gives, the choice is kept; lean layers compute what their originals do."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from engine.compiled import compiled
from engine.models import LoadedModel, load
from engine.pages import PagePool
from engine.runner import ways
from engine.runner.lean import Gate, LeanLayer, Rotate
from engine.runner.linear import TILE, Product, prepare
from engine.runner.packed import PackedRunner
from tests.oracle import Oracle


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64, 130])
@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_is_a_linear_layer(name, rows, add, bias):
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(40, 24, generator=generator), torch.randn(rows, 24, generator=generator)
    b = torch.randn(40, generator=generator) if bias else None
    more = torch.randn(rows, 40, generator=generator) if add else None
    before = None if more is None else more.clone()
    out = ways.WAYS[name](weight)(x, b, more)
    expected = F.linear(x, weight, b) + (0 if more is None else more)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(), "whoever takes it may view it"
    assert more is None or torch.equal(more, before), "what is added is left as it was"


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

    monkeypatch.setattr(ways, "_measure", lambda weights: pytest.fail("measured again"))
    assert ways.choose([lambda: weight]) == first
    (tmp_path / "linear.json").write_text("{broken")
    monkeypatch.setattr(ways, "_measure", lambda weights: ["plain"] * 3)
    assert ways.choose([lambda: weight]) == list(zip(ways.ROWS, ["plain"] * 3, strict=False))


def test_a_product_takes_the_way_of_its_rows_and_the_last_beyond(monkeypatch):
    taken = []
    for name in ("plain", "left"):
        monkeypatch.setitem(
            ways.WAYS, name, lambda weight, name=name: lambda x, b, add: taken.append(name) or F.linear(x, weight, b)
        )
    monkeypatch.setattr("engine.runner.linear.choose", lambda weights: [(2, "plain"), (8, "left")])
    weights = [torch.nn.Parameter(torch.randn(n, 6), requires_grad=False) for n in (3, 5)]
    biases = [torch.randn(3), torch.randn(5)]
    product = Product(weights, biases)
    assert prepare([product]) == 0, "nothing was packed"
    for rows in (1, 2, 3, 8, 99):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(product(x), F.linear(x, torch.cat([*weights]), torch.cat(biases)))
    assert taken == ["plain", "plain", "left", "left", "left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiled_row_has_the_same_bits_in_any_company(dtype):
    product = Product([torch.randn(40, 24, dtype=dtype)], [], tiled=True)
    prepare([product])
    x, more = (torch.randn(3 * TILE + 5, width, dtype=dtype) for width in (24, 40))
    for add in (None, more):
        whole = product(x, add)
        assert whole.shape == (len(x), 40)
        for at in (0, 7, TILE, 3 * TILE + 4):
            one, rest = (None, None) if add is None else (add[at : at + 1], add[at:])
            assert torch.equal(product(x[at : at + 1], one)[0], whole[at])
            assert torch.equal(product(x[at:], rest)[0], whole[at])


def runner(model, **options) -> PackedRunner:
    return PackedRunner(model, PagePool(8, 16), **options)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral"])
def test_layers_built_like_llamas_are_lean(name):
    model = load(f"random:{name}").model
    assert all(isinstance(layer, LeanLayer) for layer in runner(model).model.base_model.layers)
    assert not any(isinstance(layer, LeanLayer) for layer in model.modules())


def test_layers_with_other_parts_are_left_alone():
    packed = runner(load("random:tiny-gemma3").model).model
    assert not any(isinstance(module, LeanLayer) for module in packed.modules())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("head_eps", [None, 1e-6])
def test_what_lies_between_the_products_is_the_same_compiled(head_eps, biased):
    heads, kv_heads, dim, width, rows = 4, 2, 8, 24, 32
    qkv = (heads + 2 * kv_heads) * dim
    constants = [torch.randn(qkv)] * biased + [torch.randn(heads + kv_heads, dim)] * (head_eps is not None)
    pairs = [
        (
            Rotate(heads, kv_heads, dim, 1e-5, head_eps, biased),
            lambda t: [torch.randn(t, width), torch.randn(t, qkv), *torch.randn(2, t, 1, dim // 2)],
            constants,
        ),
        (
            Gate(torch.nn.SiLU(), 1e-5, biased),
            lambda t: [torch.randn(t, width), torch.randn(t, 60)],
            [torch.randn(60)] * biased,
        ),
    ]
    for function, tensors, fixed in pairs:
        run = compiled(function, [*tensors(rows), *fixed], [(0,)] * len(tensors(rows)) + [()] * len(fixed))
        if run is function:
            pytest.skip("no C++ compiler here")
        for t in (1, 2, 7, rows, 300):
            given = [*tensors(t), *fixed]
            for found, expected in zip(run(*given), function(*given), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                assert found.is_contiguous(), "attention views it"


def test_compiling_takes_one_tensor_given_twice_for_two(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    example = torch.randn(5, 8)
    function = Subtract()
    run = compiled(function, [example, example], [(0,), (0,)])
    if run is function:
        pytest.skip("no C++ compiler here")
    a, b = torch.randn(2, 9, 8)
    torch.testing.assert_close(run(a, b)[0], a - b)
    torch.testing.assert_close(run(a.t().contiguous().t(), b)[0], a - b)
    assert len(list(tmp_path.glob("subtract-*.pt2"))) == 1


@dataclass(frozen=True)
class Subtract:
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor]:
        return (a - b,)


def test_layers_that_only_look_like_llamas_run_as_they_are(caplog):
    # Granite has Llama's parts and scales what they add to the residual.
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("granite", num_key_value_heads=2, residual_multiplier=0.5, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        packed = runner(model).model
    assert "look like Llama's but are not" in caplog.text
    assert not any(isinstance(module, LeanLayer) for module in packed.modules())
    from engine import Engine, EngineConfig, SamplingParams

    loaded = LoadedModel("granite", model, None, "random")
    engine = Engine(loaded, EngineConfig(kv_memory=2**24))
    for output in engine.generate([[5, 6, 7], [8] * 20], SamplingParams(max_new_tokens=6, ignore_eos=True)):
        Oracle(loaded).check(output, 6)
