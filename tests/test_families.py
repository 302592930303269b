"""Families of models: which run compiled, what is read of their parts; all give what `generate` gives."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine import Engine, EngineConfig, LoadedModel, SamplingParams
from engine.backends.cpu.model import CompiledDecoder
from engine.backends.cuda import can_run
from engine.backends.cuda.backend import CudaBackend
from engine.backends.transformers.backend import TransformersBackend
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import DecoderSpec, describe
from tests.oracle import Oracle
from tests.serving import runner_of, use_cuda_backend

SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, initializer_range=0.3
)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
SIZES |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
HEAD = SIZES | dict(head_dim=16)
WIDE_HEAD = SIZES | dict(head_dim=48)
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = dict(sliding_window=8, layer_types=[SLIDING, FULL] * 2)
GEMMA = WINDOW | dict(query_pre_attn_scalar=24)
CAPS = dict(attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
MULTIPLIERS = dict(embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
PARTLY = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)
LONG = dict(rope_type="longrope", rope_theta=1e4, factor=2.0, original_max_position_embeddings=256)
LONG |= dict(short_factor=[1.0 + i / 10 for i in range(8)], long_factor=[4.0] * 8)
BIASES = dict(attention_bias=True, mlp_bias=True)
LOCAL_ROPE = {
    SLIDING: dict(rope_type="default", rope_theta=1e4),
    FULL: dict(rope_type="default", rope_theta=1e6),
}
TEMPERATURE = YARN | dict(llama_4_scaling_beta=0.1, original_max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MLA = dict(kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)

COMPILED: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SIZES),
    "llama, MQA, biases": ("llama", WIDE_HEAD | BIASES | dict(num_key_value_heads=1)),
    "llama, MHA, tied": ("llama", SIZES | dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama, yarn": ("llama", SIZES | dict(rope_parameters=YARN)),
    "mistral": ("mistral", SIZES | dict(sliding_window=8)),
    "ministral": ("ministral", HEAD | WINDOW),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", HEAD),
    "qwen3, biases": ("qwen3", WIDE_HEAD | dict(attention_bias=True, num_key_value_heads=4)),
    "smollm3": ("smollm3", SIZES | dict(no_rope_layers=[1, 1, 1, 0])),
    "smollm3, window": ("smollm3", SIZES | dict(use_sliding_window=True, sliding_window=8)),
    "seed-oss": ("seed_oss", HEAD),
    "phi3": ("phi3", SIZES),
    "phi3, MHA, window": ("phi3", SIZES | dict(num_key_value_heads=4, sliding_window=9)),
    "phi3, MQA, partial": (
        "phi3",
        SIZES
        | dict(hidden_size=128, num_key_value_heads=1, rope_parameters=PARTLY, tie_word_embeddings=True),
    ),
    "phi3, longrope": ("phi3", SIZES | dict(rope_parameters=LONG, original_max_position_embeddings=256)),
    "granite": ("granite", SIZES | MULTIPLIERS | dict(logits_scaling=4.0)),
    "granite, biases": ("granite", SIZES | MULTIPLIERS | BIASES | dict(num_key_value_heads=1)),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", HEAD | GEMMA | CAPS),
    "gemma2, MQA, biases": (
        "gemma2",
        WIDE_HEAD | GEMMA | CAPS | dict(num_key_value_heads=1, attention_bias=True),
    ),
    "gemma3": ("gemma3_text", HEAD | GEMMA | dict(rope_parameters=LOCAL_ROPE)),
    "gemma3, MHA, capped": (
        "gemma3_text",
        WIDE_HEAD
        | GEMMA
        | dict(num_key_value_heads=4, final_logit_softcapping=4.0, tie_word_embeddings=False),
    ),
    "vaultgemma": ("vaultgemma", HEAD | GEMMA | CAPS),
    "olmo2": ("olmo2", SIZES),
    "olmo2, MHA, biases": ("olmo2", SIZES | dict(num_key_value_heads=4, attention_bias=True)),
    "olmo2, MQA": ("olmo2", SIZES | dict(num_key_value_heads=1)),
    "olmo3": ("olmo3", SIZES | WINDOW),
    "exaone4": ("exaone4", SIZES | WINDOW),
    "glm": ("glm", HEAD),
    "glm, no biases": ("glm", WIDE_HEAD | dict(attention_bias=False)),
    "glm4": ("glm4", HEAD),
    "helium": ("helium", HEAD),
    "ernie": ("ernie4_5", HEAD),
    "cohere": ("cohere", SIZES),
    "cohere, head norms": ("cohere", SIZES | dict(use_qk_norm=True, attention_bias=True)),
    "cohere2": ("cohere2", HEAD | WINDOW),
}
AS_WRITTEN: dict[str, tuple[str, dict]] = {
    "ministral3, temperature": ("ministral3", HEAD | dict(rope_parameters=TEMPERATURE)),
    "heads of 24": ("llama", SIZES | dict(head_dim=24)),
    "an odd width": ("llama", HEAD | dict(hidden_size=65, num_attention_heads=5, num_key_value_heads=1)),
    "no gates": ("starcoder2", SIZES),
    "norms without weights": ("olmo", SIZES),
    "norms after RoPE": ("hunyuan_v1_dense", HEAD),
    "learned positions": (
        "gpt2",
        dict(vocab_size=256, n_embd=64, n_layer=3, n_head=4, initializer_range=0.3),
    ),
    "experts": ("mixtral", SIZES | EXPERTS),
    "experts and sinks": ("gpt_oss", HEAD | EXPERTS | dict(sliding_window=8)),
    "MLA, complex angles": (
        "deepseek_v2",
        SIZES | MLA | dict(num_key_value_heads=4, first_k_dense_replace=4),
    ),
    "MLA": ("deepseek_v3", SIZES | MLA | dict(num_key_value_heads=4, first_k_dense_replace=4)),
}
LENGTHS, TOKENS = (1, 5, 12, 23, 40), 10


def made(kind: str, sizes: dict) -> PreTrainedModel:
    """A model of random weights; those of norms are made as ones or zeros, which would hide much."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                nn.init.normal_(parameter, 0.4, 0.3)
    return model.eval().requires_grad_(False)


@cache
def oracle(name: str) -> Oracle:
    return Oracle(LoadedModel(name, made(*(COMPILED | AS_WRITTEN)[name]), None, "random"))


def spec_of(model: PreTrainedModel) -> DecoderSpec:
    spec = describe(model, attention_layers(model))
    assert spec is not None
    return spec


def check(known: Oracle, **config) -> Engine:
    """Every request gets what `generate` gives it alone, in batches, chunks and pages of odd sizes."""
    engine = Engine(known.loaded, EngineConfig(max_batch_size=3, page_size=5, kv_memory=2**22, **config))
    prompts = [
        torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS
    ]
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    for output in engine.generate(prompts, params, progress=False):
        known.check(output, TOKENS)
    return engine


@pytest.mark.parametrize("name", COMPILED)
def test_a_family_is_compiled_and_equals_generate(name):
    engine = check(oracle(name), max_step_tokens=16)
    assert isinstance(engine.runner.backend, CompiledDecoder)


@pytest.mark.parametrize("name", COMPILED)
def test_a_family_runs_on_the_backend_for_a_gpu_and_equals_generate(name, monkeypatch):
    use_cuda_backend(monkeypatch)
    spec = spec_of(oracle(name).model)
    assert can_run(spec)
    engine = check(oracle(name), max_step_tokens=16)
    assert isinstance(engine.runner.backend, CudaBackend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_a_family_is_known_in_16_bits_and_proven(name, dtype, monkeypatch):
    """Parts are told apart through their rounding."""
    use_cuda_backend(monkeypatch)
    runner = runner_of(made(*COMPILED[name]).to(dtype))
    assert isinstance(runner.backend, CudaBackend)
    exact, found = spec_of(oracle(name).model), runner.backend.decoder.spec
    for one, other in zip(exact.layers, found.layers, strict=True):
        assert (one.rope and one.rope.arguments) == (other.rope and other.rope.arguments)
        assert (one.q_norm and one.q_norm.centred) == (other.q_norm and other.q_norm.centred)
    assert found.embedding_scale == pytest.approx(exact.embedding_scale, rel=1e-2)


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_what_has_other_parts_runs_as_it_was_written_and_equals_generate(name, caplog):
    engine = check(oracle(name), max_step_tokens=16)
    assert isinstance(engine.runner.backend, TransformersBackend)
    assert "own code instead" not in caplog.text, "none is tried in vain"


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "phi3", "granite", "cohere2", "glm4"])
def test_the_bits_do_not_depend_on_the_batch_or_on_chunks_in_float32_and_int8(name):
    for dtype in ("float32", "int8"):
        found = []
        for options in (dict(max_batch_size=1), dict(max_batch_size=5, max_step_tokens=13)):
            config = EngineConfig(dtype=dtype, deterministic=True, kv_memory=2**22, **options)
            engine = Engine(oracle(name).loaded, config)
            prompts = [[(7 * i + n) % 250 + 3 for i in range(n)] for n in LENGTHS]
            params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=3)
            outputs = engine.generate(prompts, params, progress=False)
            found.append([(output.token_ids, output.logprobs) for output in outputs])
            assert isinstance(engine.runner.backend, CompiledDecoder)
        assert found[0] == found[1]
