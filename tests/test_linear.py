"""Products: every way gives what F.linear gives, the choice is kept; lean layers compute what their originals do."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from engine import Engine, EngineConfig, SamplingParams
from engine.attention.paged import Store
from engine.attention.rows import attend_rows, example, rows_of
from engine.models import LoadedModel, load
from engine.pages import PagePool
from engine.runner import ways
from engine.runner.formulas import Gate, Layer, Rotate, Turn
from engine.runner.lean import LeanLayer
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
    assert ways.LONE not in {name for _, name in first[1:]}, "it is for one row"
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


@pytest.mark.parametrize(
    ("available", "tiled", "names", "copies"),
    [(10**6, False, ["Panels", "Packed"], 2), (10**4, False, ["Packed"], 1), (10**6, True, ["Packed"], 1)],
)
@pytest.mark.parametrize("lone", [[True, True, True], [True, False, True]])
def test_a_second_copy_is_held_for_lone_rows_where_memory_is_plenty(monkeypatch, available, tiled, names, copies, lone):
    """Of all weights, where that is best for most."""
    rules = iter([(1, ways.LONE)] * is_lone + [(512, "packed")] for is_lone in lone)
    monkeypatch.setattr("engine.runner.linear.choose", lambda weights: next(rules))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    products = [Product([torch.randn(size, 24)], [], tiled) for size in (40, 41, 42)]
    assert prepare(products) == copies * (40 + 41 + 42) * 24 * 4
    for product in products:
        assert [type(way).__name__ for _, way in product.ways] == names


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


def test_only_tokens_whose_logits_are_wanted_go_through_all_of_the_last_layer(tiny):
    oracle: Oracle = tiny("tiny-llama")
    engine = Engine(oracle.loaded, EngineConfig(runner="packed", max_batch_size=3, max_step_tokens=16))
    base, widths = engine.runner.model.base_model, []
    base.norm.register_forward_hook(lambda module, given, out: widths.append(out.shape[1]))
    prompts = [[5, 6, 7], [9] * 20, [3, 1, 4, 1, 5]]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=4, ignore_eos=True), progress=False)
    for output in outputs:
        oracle.check(output, 4)
    assert widths[:3] == [1, 3, 3], "of 3 + 13 tokens, of 1 + 7 + 5, and of three alone"


@pytest.mark.parametrize(("head_eps", "biased"), [(None, False), (1e-6, True)])
@pytest.mark.parametrize("rows", [[], [40], [3, 0, 70, 17, 16]], ids=len)
def test_layers_are_the_same_compiled(rows, head_eps, biased, compiler):
    """Turn and Layer, in a shape of their own, give and write what torch does: for no rows too, and beside chunks.

    The layer multiplies by packed weights and by panels, which some of its products do not fill.
    """
    generator = torch.Generator().manual_seed(len(rows))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads, kv_heads, dim, width, inner, size = 6, 2, 32, 48, 40, 16
    shapes = [((heads + 2 * kv_heads) * dim, width), (width, heads * dim), (2 * inner, width), (width, inner)]
    weights = [random(*shape) / 8 for shape in shapes]
    packed = [ways.Packed(weight).copy for weight in weights]
    panels = [ways.Panels(weight).copy_CMW for weight in weights]
    rotate, gate = Rotate(heads, kv_heads, dim, 1e-5, head_eps, biased), Gate(torch.nn.SiLU(), 1e-5, biased)
    turning = [random(shapes[0][0])] * biased + [random(heads + kv_heads, dim)] * (head_eps is not None)
    gating = [random(2 * inner)] * biased
    stores = [Store.zeros((64, kv_heads, size, dim), torch.zeros(())) for _ in range(2)]
    for half in ("keys_LKDP", "values_LKBPE"):
        getattr(stores[0], half).normal_(generator=generator)
        getattr(stores[1], half).copy_(getattr(stores[0], half))

    count = 32
    angle = torch.zeros(count, 1, dim // 2)
    pages, sizes = example(count, stores[0].keys_LKDP, stores[0].values_LKBPE)
    given = [torch.zeros(count, width), torch.zeros(count, shapes[0][0]), angle, angle, torch.arange(count)]
    turn = compiler.add(Turn(rotate), [*given, *pages, *turning], [(0,)] * 5 + sizes + [()] * len(turning))
    dynamic = [(0,)] * 3 + [()] * 4 + sizes + [()] * len([*turning, *gating])
    layers = []
    for by_panels, copies in enumerate((packed, panels)):
        given = [torch.zeros(count // ways.FEW, ways.FEW, width), angle, angle]
        given += [*(torch.zeros(copy.shape) for copy in copies), *pages, *turning, *gating]
        layers.append((compiler.add(Layer(rotate, gate, bool(by_panels)), given, dynamic), copies))
    compiler.finish()
    assert all(compiled.built for compiled in (turn, layers[0][0], layers[1][0]))

    def places(rows: list[int]) -> tuple[list[torch.Tensor], ...]:
        tables = [(list(range(8 * row, 8 * row + 8)), past) for row, past in enumerate(rows)]
        read = rows_of(tables, size, None, torch.float32, torch.device("cpu"))
        page_R = torch.tensor([pages[past // size] for pages, past in tables], dtype=torch.long)
        offset_R = torch.tensor([past % size for past in rows], dtype=torch.long)
        where = [page_R, offset_R, read.page_N, read.owner_N, read.bias_NP, read.place_XR]
        return tuple([store.keys_LKDP, store.values_LKBPE, *where] for store in stores)

    x, (cos, sin) = random(len(rows) + 7, width), random(2, len(rows) + 7, 1, dim // 2)
    tokens_R = torch.arange(len(rows)) + 4
    ours, torchs = places(rows)
    product = x @ weights[0].T
    qkv = rotate(x, product, cos, sin, *turning)
    attended = attend_rows(*(part[tokens_R] for part in qkv), *torchs) if rows else qkv[0][:0]
    found = turn(x, product, cos, sin, tokens_R, *ours, *turning)
    for one, other in zip(found, (*qkv, attended), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if rows:
        filled = [*rows, *[0] * (-len(rows) % ways.FEW)]
        ours, torchs = places(filled)
        span = slice(4, 4 + len(filled))
        x, cos, sin = x[span], cos[span], sin[span]
        mixed = attend_rows(*rotate(x, x @ weights[0].T, cos, sin, *turning), *torchs).flatten(1)
        middle = x + mixed @ weights[1].T
        expected = middle + gate(middle, middle @ weights[2].T, *gating)[0] @ weights[3].T
        for layer, copies in layers:
            (found_BRM,) = layer(x.unflatten(0, (-1, ways.FEW)), cos, sin, *copies, *ours, *turning, *gating)
            torch.testing.assert_close(found_BRM.flatten(0, 1), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stores[0].keys_LKDP, stores[1].keys_LKDP)
    torch.testing.assert_close(stores[0].values_LKBPE, stores[1].values_LKBPE)


def test_compiling_takes_one_tensor_given_twice_for_two(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    like = torch.randn(5, 8)
    run = compiler.add(Subtract(), [like, like], [(0,), (0,)])
    compiler.finish()
    assert run.built
    a, b = torch.randn(2, 9, 8)
    torch.testing.assert_close(run(a, b)[0], a - b)
    torch.testing.assert_close(run(a.t().contiguous().t(), b)[0], a - b)
    assert len(list(tmp_path.glob("subtract-*.pt2"))) == 1


def test_a_free_size_stays_free(tmp_path, monkeypatch, compiler, caplog):
    """A program for one size would read another beyond its end."""
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    run = compiler.add(Fixed(), [torch.ones(5, 8)], [(0,)])
    compiler.finish()
    assert not run.built
    assert "gives a free size a meaning" in caplog.text
    assert torch.equal(run(torch.ones(3, 8))[0], torch.full((3, 8), 3.0)), "torch runs it"


@dataclass(frozen=True)
class Fixed:
    def __call__(self, a: torch.Tensor) -> tuple[torch.Tensor]:
        return (a * len(a),)


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
