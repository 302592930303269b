"""int8 weights: products are those of the rounded weights, answers stay near float32's, misuse fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from engine import Engine, EngineConfig, InputError, SamplingParams, make_workload
from engine.backends.cpu import model as cpu_model
from engine.backends.cpu.model import CompiledDecoder
from engine.backends.cpu.simd import HAS_QUAD_PRODUCTS
from engine.backends.cpu.tile import HIGH_STEP, ZERO_BYTE
from engine.backends.cpu.x_rows import BLOCK_DEPTH, NO_NORM, Own, make_rows
from engine.models import load
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from engine.runner import verify
from engine.runner.packed import PackedRunner
from engine.step import Batch, Span
from perf.measure.accuracy import accuracy
from tests.oracle import Oracle
from tests.serving import runner_of
from tests.test_cpu import random_model


@pytest.mark.parametrize(
    "config",
    [dict(runner="padded", policy="dynamic"), dict(device="cuda"), dict(device="cuda:1"), dict(device="mps")],
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


def quantized_runner(model) -> PackedRunner:
    return runner_of(model, dtype="int8")


NAMES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3")


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_near_the_models_own_and_weights_are_held_once(tiny, name):
    model = tiny(name).model
    runner = quantized_runner(model)
    tokens = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected, found = model(torch.tensor([tokens])).logits[0], runner.logits(tokens)
    off = float((found - expected).norm() / expected.norm())
    assert 1e-4 < off < 0.1, "quantized, and not far off"
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.8
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert linear < runner.copied_bytes < 1.7 * linear, "a byte a weight, the scales, and what fills panels"


@pytest.mark.parametrize("quads", [False, True])
def test_logits_are_those_of_the_rounded_weights(quads, monkeypatch):
    """Where nothing is folded into weights, a model with rounded ones gives the same."""
    monkeypatch.setattr(cpu_model, "HAS_QUAD_PRODUCTS", quads and HAS_QUAD_PRODUCTS)
    model = load("random:tiny-llama").model
    scale = model.config.head_dim**-0.5
    spec = describe(model, attention_layers(model))
    assert spec is not None
    compiled = CompiledDecoder(spec, 16)
    compiled.quantize()
    compiled._kv_dtype = torch.float32  # so that nothing but weights is rounded
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear:
                scaled = module.weight * scale if name.endswith("q_proj") else module.weight
                step_N1 = scaled.abs().amax(1, keepdim=True) / 127
                rounded = (scaled / step_N1).round() * step_N1
                module.weight.copy_(rounded / scale if name.endswith("q_proj") else rounded)
        tokens = [(31 * i) % 256 for i in range(70)]
        compiled.allocate_kv(5)
        found = compiled.logits(Batch(tokens, [Span(0, 70, 0, list(range(5)))], list(range(70))))
        expected = model(torch.tensor([tokens])).logits[0]
    off = 3e-3 if cpu_model.HAS_QUAD_PRODUCTS else 1e-4  # inputs are integers of 15 bits then
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=off * float(expected.abs().max()))


def test_pages_are_in_bfloat16_and_twice_as_many(tiny):
    loaded = tiny("tiny-llama").loaded
    pools = {}
    for dtype in ("float32", "int8"):
        engine = Engine(loaded, EngineConfig(dtype=dtype, kv_memory=2**16))
        pools[dtype] = engine.runner.memory.pages, engine.runner.backend.page_bytes
    (pages, page_bytes), (more_pages, smaller) = pools["float32"], pools["int8"]
    assert page_bytes == 2 * smaller
    assert pages == 2**16 // page_bytes
    assert more_pages == 2**16 // smaller
    page = EngineConfig(dtype="int8", kv_memory=smaller)
    assert Engine(loaded, page).runner.memory.pages == 1
    with pytest.raises(InputError, match="page_size=16 is too large: a page takes more than kv_memory"):
        Engine(loaded, EngineConfig(dtype="int8", kv_memory=smaller - 1))


@njit
def rounded(x_TM, size, eps, own):
    return make_rows(np.int64(1), x_TM, np.int64(1), len(x_TM), size, eps, own)


def own_memory(size: int) -> Own:
    slices = -(-size // BLOCK_DEPTH)
    return Own(
        0,
        1,
        np.full(64, np.nan, np.float32),
        np.zeros((slices, 128), np.int32),
        np.zeros((128, size + 16), np.int8),
    )


@pytest.mark.parametrize("eps", [NO_NORM, 1e-6])
def test_rows_are_rounded_to_two_bytes_a_number(eps):
    rng = np.random.default_rng(0)
    size, rows = BLOCK_DEPTH + 32, 7
    x_TM = (rng.normal(size=(rows + 1, size + 16)) * rng.lognormal(0, 3, (rows + 1, 1))).astype(np.float32)
    x_TM[2, :size], x_TM[3, :size] = 0, 1e-38
    x_TM[:, size:] = np.nan  # of nobody
    own = own_memory(size)
    rounded(x_TM, size, eps, own)
    for t, x_M in enumerate(x_TM[1:, :size].astype(float)):
        norm = 1 / np.sqrt(np.mean(x_M**2) + eps) if eps > 0 else 1.0
        high_M, low_M = own.rows_UY[2 * t : 2 * t + 2, :size].astype(int)
        found_M, step = HIGH_STEP * high_M + low_M, np.abs(x_M).max() / (127 * HIGH_STEP)
        assert np.abs(found_M * step - x_M).max() <= 0.501 * step or step < 1e-30
        assert np.abs(found_M).max() in (127 * HIGH_STEP, 0 if step < 1e-30 else -1)
        assert own.factors_T[t] == pytest.approx(norm * step, rel=1e-5, abs=1e-38)
        for u, part_M in ((2 * t, high_M), (2 * t + 1, low_M)):
            sums = [part_M[:BLOCK_DEPTH].sum(), part_M[BLOCK_DEPTH:].sum()]
            assert own.starts_ZU[:, u].tolist() == [-ZERO_BYTE * total for total in sums]
    assert np.isnan(own.factors_T[rows:]).all(), "nothing beyond is touched"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5, 31])
def test_what_is_no_number_stays_none(bad, at):
    x_TM = np.ones((2, 32), np.float32)
    x_TM[1, at] = bad
    own = own_memory(32)
    own.factors_T[:] = 0
    rounded(x_TM, 32, NO_NORM, own)
    assert not np.isfinite(own.factors_T[0])


@pytest.mark.skipif(not HAS_QUAD_PRODUCTS, reason="this processor does not multiply bytes four at a time")
def test_inputs_of_products_become_integers_where_sizes_are_whole_vectors(tiny):
    def weights(model):
        spec = describe(model, attention_layers(model))
        assert spec is not None
        compiled = CompiledDecoder(spec, 16)
        compiled.quantize()
        return compiled.weights

    assert {part.numbers.dtype for part in weights(tiny("tiny-llama").model)[1:6]} == {np.dtype(np.uint8)}
    odd = random_model(intermediate_size=72)
    assert {part.numbers.dtype for part in weights(odd)[1:6]} == {np.dtype(np.int8)}


def test_wrong_weights_are_caught(tiny, monkeypatch):
    right = cpu_model._rounded

    def wrong(panels, quads):
        return right(panels, quads)._replace(scales_LCW=panels.numbers[:, :, 0])

    monkeypatch.setattr(cpu_model, "_rounded", wrong)
    with pytest.raises(InputError, match="other logits when packed"):
        quantized_runner(tiny("tiny-llama").model)


def test_models_with_other_parts_are_refused():
    loaded = load("random:tiny-llama")
    loaded.model.base_model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(InputError, match=r"^dtype='int8' is for decoders that run compiled: Llama"):
        Engine(loaded, EngineConfig(dtype="int8"))


@pytest.mark.parametrize("policy", ["sequential", "dynamic", "continuous"])
@pytest.mark.parametrize("name", NAMES)
def test_batched_equals_unbatched(tiny, name, policy):
    loaded = tiny(name).loaded
    items = make_workload("mixed-12", vocab_size=256, seed=1).items
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
    assert found["same_top_1"] > 0.8
    assert found["kl_nats"] > 0
    monkeypatch.setitem(verify.TOLERANCE, torch.int8, torch.inf)  # it would be refused
    monkeypatch.setattr(cpu_model, "LEVELS", 15)  # five bits
    coarse = accuracy(loaded, tokens)
    assert coarse["kl_nats"] > 1.5 * found["kl_nats"]
    assert coarse["perplexity_float32"] == found["perplexity_float32"]


def test_answers_do_not_depend_on_the_batch(tiny):
    loaded = tiny("tiny-llama").loaded
    prompts = [item.prompt[:60] for item in make_workload("mixed-12", vocab_size=256, seed=1).items]
    params = SamplingParams(max_new_tokens=1, ignore_eos=True, logprobs=1)
    engine = Engine(loaded, EngineConfig(dtype="int8", kv_memory=2**22, prefix_caching=False))
    together = engine.generate(prompts, params, progress=False)
    alone = [engine.generate([prompt], params, progress=False)[0] for prompt in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
