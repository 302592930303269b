"""int8: products are those of the integers, rows know no neighbours, answers stay near float32's, misuse fails."""

from __future__ import annotations

import pytest
import torch

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.pages import PagePool
from engine.runner import int8, packed
from engine.runner.int8 import Int8, Watched, rounded, weight_limit
from engine.runner.packed import PackedRunner
from engine.workload import make
from perf.accuracy import accuracy
from tests.oracle import Oracle

FLAT = torch.ones(24)


def made(rows: int, outputs: int = 40, inputs: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 17, 130])
def test_a_product_is_that_of_the_integers(rows, bias):
    weight, x = made(rows)
    b = torch.randn(40) if bias else None
    peaks = FLAT.clone()
    peaks[5] = 50.0  # 25 times what is near, and so a fifth of it as an input
    x[:, 5] *= 50.0
    x_ease, w_ease = torch.ones(24).double(), torch.ones(24).double()
    x_ease[5], w_ease[5] = 0.2, 5.0

    w = weight.double() * w_ease
    w_scale = w.abs().amax(1) / weight_limit()
    eased = x.double() * x_ease
    x_scale = eased.abs().amax(1, keepdim=True) / 127
    expected = (eased / x_scale).round() @ (w / w_scale[:, None]).round().t() * w_scale * x_scale
    out = Int8(weight, peaks)(x, b)
    torch.testing.assert_close(out.double(), expected if b is None else expected + b, rtol=1e-5, atol=1e-4)
    near = x.double() @ weight.double().t()
    assert (expected - near).norm() < 0.02 * near.norm()


def test_a_row_has_the_same_bits_in_any_company():
    weight, x = made(300, 192, 96)
    product = Int8(weight, torch.ones(96))
    whole = product(x, None)
    for rows in (1, 2, 7, 16, 33, 128):
        for at in (0, 5, 300 - rows):
            assert torch.equal(product(x[at : at + rows], None), whole[at : at + rows]), (rows, at)
    x[7] = 1e6
    assert torch.equal(product(x, None)[:7], whole[:7]), "a neighbour's size changed it"


def test_rows_of_zeros_and_nan_stay_by_themselves():
    weight, x = made(4)
    product = Int8(weight, FLAT)
    whole = product(x, None)
    x[1], x[2, 3] = 0.0, torch.nan
    out = product(x, None)
    assert torch.equal(out[[0, 3]], whole[[0, 3]])
    assert (out[1] == 0).all()
    assert out[2].isnan().all()
    assert product(x[:0], None).shape == (0, 40)
    x[2, 3] = torch.inf
    assert not product(x, None)[2].isfinite().any()


def test_every_level_rounds_to_nearest():
    x = torch.linspace(-1, 1, 2001)[None]
    q, scale = rounded(x, torch.ones(2001))
    assert (int(q.min()), int(q.max())) == (1, 255)
    assert float(((q.int() - 128) * scale - x).abs().max()) <= 0.5 / 127 + 1e-6


def test_what_is_large_is_large_beside_its_own_row():
    weight, x = made(9)
    flat, steep = Watched(weight), Watched(weight)
    flat(x, None)
    steep(x * torch.logspace(-3, 3, 9)[:, None], None)
    torch.testing.assert_close(steep.peak_M, flat.peak_M)
    flat(torch.zeros(2, 24), None)
    torch.testing.assert_close(steep.peak_M, flat.peak_M)


def test_a_machine_that_overflows_gets_less_range_and_a_wrong_one_is_refused(monkeypatch):
    right = int8._linear

    def saturating(q, packed, *scales):  # what sums of pairs in 16 bits come to without VNNI
        return right(q, packed, *scales).clamp(max=127 * 127 * 64 - 1)

    def wrong(*tensors):
        return right(*tensors) * 1.01

    weight, _ = made(1)
    weight_limit.cache_clear()
    try:
        monkeypatch.setattr(int8, "_linear", saturating)
        assert weight_limit() == 64
        monkeypatch.setattr(int8, "_linear", wrong)
        with pytest.raises(InputError, match=r"int8 products are wrong .*float32"):
            Int8(weight, FLAT)
        weight_limit.cache_clear()
        with pytest.raises(InputError, match=r"dtype='int8' needs .*dtype='float32'"):
            Engine.from_pretrained("org/not-fetched", EngineConfig(dtype="int8"))
    finally:
        weight_limit.cache_clear()


@pytest.mark.parametrize(
    "config", [dict(runner="padded", policy="dynamic"), dict(device="cuda"), dict(device="cuda:1"), dict(device="mps")]
)
def test_what_cannot_be_int8_is_refused_at_once(config):
    with pytest.raises(InputError, match=r"dtype='int8' runs packed on a CPU, not with (runner|device)="):
        EngineConfig(dtype="int8", **config)


def test_only_float32_models_are_quantized(tiny):
    with pytest.raises(InputError, match="quantizes a float32 model on a CPU; this one is float64"):
        Engine(tiny("tiny-llama", "float64").loaded, EngineConfig(dtype="int8"))


def test_a_model_that_cannot_run_packed_does_not_fall_back(tiny, monkeypatch):
    oracle: Oracle = tiny("tiny-llama")
    monkeypatch.setattr(type(oracle.model), "_supports_attention_backend", False)
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        Engine(oracle.loaded, EngineConfig(dtype="int8"))


def quantized_runner(model, **options) -> PackedRunner:
    return PackedRunner(model, PagePool(8, 16), int8=True, **options)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"])
def test_logits_stay_near_the_models_own_and_weights_are_held_once(tiny, name):
    model = tiny(name).model
    runner = quantized_runner(model)
    tokens = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected, found = model(torch.tensor([tokens])).logits[0], runner.logits(tokens)
    off = float((found - expected).norm() / expected.norm())
    coarser = int8.LIMITS[0] / weight_limit()  # 2 without VNNI
    assert 1e-4 < off < 0.15 * coarser, "quantized, and not far off"
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 1 - 0.25 * coarser
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert linear < runner.copied_bytes < 1.5 * linear, "a byte a weight, and the scales"


def test_a_broken_product_is_caught(tiny, monkeypatch):
    right = Int8.__call__
    monkeypatch.setattr(Int8, "__call__", lambda self, x, bias: right(self, x, bias) * 1.2)
    with pytest.raises(InputError, match="other logits when packed"):
        quantized_runner(tiny("tiny-llama").model)


@pytest.mark.parametrize("policy", ["sequential", "dynamic", "continuous"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-gemma3"])
def test_batched_equals_unbatched(tiny, name, policy):
    loaded = tiny(name).loaded
    items = make("mixed-12", vocab_size=256, seed=1).items
    prompts = [item.prompt[:60] for item in items]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=3)

    def run(chosen, **options):
        config = EngineConfig(dtype="int8", deterministic=True, kv_memory=2**22, policy=policy, **options)
        engine = Engine(loaded, config)
        assert (engine.config.dtype, engine.config.runner) == ("int8", "packed")
        return [(o.token_ids, o.logprobs) for o in engine.generate(chosen, params, progress=False)]

    alone = [run([prompt], max_batch_size=1)[0] for prompt in prompts[:4]]
    assert run(prompts, max_batch_size=5, max_step_tokens=40)[:4] == alone


def test_accuracy_is_measured_and_tells_a_coarser_model(tiny, monkeypatch):
    loaded = tiny("tiny-llama").loaded
    tokens = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    found = accuracy(loaded, tokens)
    assert found["tokens"] == 299
    assert found["same_top_1"] > 1 - 0.25 * int8.LIMITS[0] / weight_limit()
    assert found["kl_nats"] > 0
    monkeypatch.setitem(packed.TOLERANCE, torch.int8, torch.inf)  # it would be refused
    monkeypatch.setattr(int8, "weight_limit", lambda: 15)  # five bits
    coarse = accuracy(loaded, tokens)
    assert coarse["kl_nats"] > 1.5 * found["kl_nats"]
    assert coarse["perplexity_float32"] == found["perplexity_float32"]


def test_answers_do_not_depend_on_the_batch(tiny):
    loaded = tiny("tiny-llama").loaded
    prompts = [item.prompt[:60] for item in make("mixed-12", vocab_size=256, seed=1).items]
    params = SamplingParams(max_new_tokens=1, ignore_eos=True, logprobs=1)
    engine = Engine(loaded, EngineConfig(dtype="int8", kv_memory=2**22, prefix_caching=False))
    together = engine.generate(prompts, params, progress=False)
    alone = [engine.generate([prompt], params, progress=False)[0] for prompt in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
