"""int8 weights: products are those of the rounded weights, answers stay near float32's, misuse fails."""

from __future__ import annotations

import pytest
import torch

from engine import Engine, EngineConfig, InputError, SamplingParams, make_workload
from engine.backends.cpu import model as cpu_model
from engine.backends.cpu.model import CompiledDecoder
from engine.models import load
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from engine.runner import verify
from engine.runner.packed import PackedRunner
from engine.step import Batch, Span
from perf.measure.accuracy import accuracy
from tests.oracle import Oracle
from tests.serving import runner_of


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


def test_logits_are_those_of_the_rounded_weights():
    """Where nothing is folded into weights, a model with rounded ones gives the same."""
    model = load("random:tiny-llama").model
    scale = model.config.head_dim**-0.5
    spec = describe(model, attention_layers(model))
    assert spec is not None
    compiled = CompiledDecoder(spec, 16)
    compiled.quantize()
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
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_wrong_weights_are_caught(tiny, monkeypatch):
    right = cpu_model._rounded
    monkeypatch.setattr(
        cpu_model, "_rounded", lambda panels: right(panels)._replace(scales_LCW=panels.numbers[:, :, 0])
    )
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
