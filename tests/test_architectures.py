"""Architectures with parts of their own: run as they compute, or refused by name; and what the proof at load
sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import Engine, EngineConfig, InputError, LoadedModel, SamplingParams
from engine.backends.transformers.backend import TransformersBackend
from engine.kv_pool import RowPool
from engine.models import kv_bytes_per_token, kv_layers, telling_positions
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from engine.models.geometry import KVLayer
from engine.runner.padded import PaddedRunner
from engine.runner.verify import check_equal, probe
from engine.step import Batch, Span
from perf.measure.costs import model_costs
from tests.oracle import Oracle

SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3)
MLA = SIZES | dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16
)
MLA |= dict(v_head_dim=16, n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2)
MLA |= dict(moe_intermediate_size=32, first_k_dense_replace=1)
EXPERTS = SIZES | dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
EXPERTS |= dict(head_dim=16, shared_expert_intermediate_size=32)
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
GEMMA4 = SIZES | dict(head_dim=16, global_head_dim=32, sliding_window=8, layer_types=SLIDING_AND_FULL * 2)
GEMMA4 |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=256)
OLD_ROPE = dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)
OLD_ROPE |= dict(beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
SHAPES: dict[str, tuple[str, dict]] = {
    "gemma4": ("gemma4_text", GEMMA4 | dict(num_kv_shared_layers=0)),
    "gemma4 that shares": ("gemma4_text", GEMMA4 | dict(num_kv_shared_layers=2)),
    "gemma3n": (
        "gemma3n_text",
        GEMMA4 | dict(num_kv_shared_layers=2, laurel_rank=8, activation_sparsity_pattern=None),
    ),
    "deepseek v3": ("deepseek_v3", MLA),
    "ministral3": ("ministral3", SIZES | dict(head_dim=16, rope_parameters=OLD_ROPE)),
    "qwen2-moe": ("qwen2_moe", EXPERTS),
    "qwen2-moe, window": (
        "qwen2_moe",
        EXPERTS | dict(use_sliding_window=True, sliding_window=100, max_window_layers=2),
    ),
    "phimoe": ("phimoe", EXPERTS),
    "phimoe, window": ("phimoe", EXPERTS | dict(sliding_window=100)),
    "falcon, one KV head": ("falcon", {**SIZES, "multi_query": True, "parallel_attn": True}),
    "bloom": ("bloom", dict(vocab_size=256, hidden_size=64, n_layer=3, n_head=4, initializer_range=0.3)),
    "roformer": ("roformer", SIZES | dict(is_decoder=True, embedding_size=64)),
    "llama": ("llama", SIZES),
    "llama4": (
        "llama4_text",
        EXPERTS
        | dict(intermediate_size_mlp=64, layer_types=["full_attention"] * 4, no_rope_layers=[0] * 4)
        | dict(attn_temperature_tuning=True, floor_scale=16, attn_scale=0.5),
    ),
    "bart": (
        "bart",
        dict(vocab_size=256, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64),
    ),
    "bert": ("bert", SIZES),
    "openai-gpt": ("openai-gpt", dict(vocab_size=256, n_embd=64, n_layer=2, n_head=4)),
    "mamba": ("mamba", dict(vocab_size=256, hidden_size=64, num_hidden_layers=2)),
    "rwkv": ("rwkv", dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64)),
    "xlstm": ("xlstm", dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_heads=4)),
}
for kind in ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "jetmoe", "hunyuan_v1_moe", "afmoe"):
    SHAPES[kind] = kind, EXPERTS | (dict(sliding_window=8) if kind in ("gpt_oss", "afmoe") else {})
LENGTHS = (1, 5, 12, 23, 40)


@cache
def made(name: str) -> Oracle:
    kind, sizes = SHAPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Oracle(LoadedModel(name, model, None, "random"))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


def check(name: str, lengths: tuple[int, ...] = LENGTHS, tokens: int = 10, **config) -> Engine:
    """Every request gets what `generate` gives it alone."""
    oracle = made(name)
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=3, page_size=4, kv_memory=2**23, **config))
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    for output in engine.generate([prompt_of(n) for n in lengths], params, progress=False):
        oracle.check(output, tokens)
    return engine


# What a cache holds


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma4", [KVLayer(2, 16, 16), KVLayer(2, 32, 32)] * 2),
        ("gemma4 that shares", [KVLayer(2, 16, 16), KVLayer(2, 32, 32)]),  # the other two read these
        ("deepseek v3", [KVLayer(1, 16, 8)] * 4),  # compressed
        ("falcon, one KV head", [KVLayer(1, 16, 16)] * 4),
        ("bloom", [KVLayer(4, 16, 16)] * 3),
    ],
)
def test_keys_and_values_are_counted_as_the_models_own_cache_holds_them(name, layers):
    model = made(name).model
    assert kv_layers(model) == layers
    assert kv_bytes_per_token(model) == 4 * sum(
        layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers
    )
    assert model_costs(model).kv_bytes == kv_bytes_per_token(model)


@pytest.mark.parametrize(
    "policy", [pytest.param("sequential", marks=pytest.mark.slow), "dynamic", "continuous"]
)
@pytest.mark.parametrize("name", ["gemma4", "gemma4 that shares", "gemma3n", "deepseek v3"])
def test_layers_of_different_sizes_and_shared_ones_equal_generate(name, policy):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*using runner='padded'")
        engine = check(name, policy=policy)
    assert engine.config.policy == policy


def test_pages_are_counted_as_they_are():
    """Attention over pages takes the keys that the model's own cache keeps compressed."""
    loaded = made("deepseek v3").loaded
    engine = Engine(loaded, EngineConfig(kv_memory=2**20, page_size=4))
    assert engine.runner.backend.page_bytes == 4 * 4 * 4 * 4 * (24 + 16)
    assert engine.scheduler.memory.pages == 2**20 // engine.runner.backend.page_bytes


def test_layers_that_share_keys_and_values_take_no_memory_of_their_own():
    models = [made(name).model for name in ("gemma4 that shares", "gemma4")]
    sharing, whole = (TransformersBackend(model, attention_layers(model), 4) for model in models)
    for model in (sharing, whole):
        model.allocate_kv(3)
    assert sharing.page_bytes == 4 * kv_bytes_per_token(made("gemma4 that shares").model)
    assert whole.page_bytes == 2 * sharing.page_bytes


@pytest.mark.parametrize("policy", ["sequential", "dynamic", "continuous"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mamba", "has linear_attention"),
        ("rwkv", "has recurrent state"),
        ("xlstm", "has recurrent state"),
        ("openai-gpt", "keeps no keys and values"),
    ],
)
def test_models_whose_past_is_something_else_are_refused_by_name(name, problem, policy):
    with pytest.raises(InputError, match=f"{problem}: only causal models with"):
        Engine(made(name).loaded, EngineConfig(policy=policy))


# The proof at load


def test_telling_positions_are_from_the_whole_range():
    config = made("ministral3").model.config
    found = telling_positions(config)
    assert found == sorted(set(found))
    assert {*range(16), 63, 64, 127, 128, 255, 256, 510, 511} <= set(found), (
        "each number of the config, and the last"
    )
    assert max(found) == 511
    assert telling_positions(config, 100)[-1] == 99, "no request has more"
    assert telling_positions(config, 10) == list(range(10))


@pytest.mark.parametrize("lengths", [(60, 61, 70), (100, 200, 63)])
def test_a_temperature_by_position_is_seen_and_kept(lengths):
    """Ministral 3 scales queries beyond the first 64 positions here: the compiled path does not know how
    to."""
    engine = check("ministral3", lengths, policy="continuous")
    assert isinstance(engine.runner.backend, TransformersBackend)


def test_a_temperature_by_position_is_seen_in_what_attention_is_given():
    """So that no decoder is made for it in vain."""
    model = made("ministral3").model
    layers = attention_layers(model)
    assert not any(layer.only_rotates for layer in layers)
    assert describe(model, layers) is None
    assert all(layer.only_rotates for layer in attention_layers(made("mixtral").model))


def test_a_proof_without_the_late_positions_would_have_passed():
    """The same model where nothing begins late gives the same logits at its first positions: they say
    nothing."""
    model, expected = made("ministral3").model, probe(made("ministral3").model, 60)
    kept = model.config.rope_parameters["llama_4_scaling_beta"]
    try:
        model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
        early, late = probe(model, 60), probe(model, 512)
    finally:
        model.config.rope_parameters["llama_4_scaling_beta"] = kept
    check_equal(model, "early", early.expected_TV, expected.expected_TV)
    with pytest.raises(InputError, match="gives other logits late"):
        check_equal(model, "late", late.expected_TV, probe(model, 512).expected_TV)


@pytest.mark.parametrize("name", ["qwen2-moe, window", "phimoe, window"])
def test_a_window_that_lives_in_the_mask_alone_is_refused_when_packed_and_kept_when_padded(name):
    loaded = made(name).loaded
    with pytest.raises(
        InputError, match="gives attention no window in layer 0, and its mask says otherwise: position 1"
    ):
        Engine(loaded, EngineConfig(runner="packed"))
    with pytest.warns(UserWarning, match="using runner='padded' and policy='dynamic'"):
        check(name, (90, 120, 99), policy="continuous")


def test_a_mask_of_both_directions_is_refused_when_packed():
    with pytest.raises(
        InputError,
        match="gives attention no window in layer 0, and its mask says otherwise: position 0 sees 1",
    ):
        attention_layers(made("bert").model)


@pytest.mark.parametrize("name", ["bart", "bert"])
def test_what_padding_or_chunks_would_change_is_refused_when_padded(name):
    """BART counts positions from the first column, BERT looks ahead."""
    with pytest.raises(InputError, match="gives other logits when padded"):
        PaddedRunner(made(name).model, 8192, RowPool(100))


@pytest.mark.parametrize("name", ["gemma4 that shares", "gemma3n", "roformer", "llama", "bloom"])
def test_rows_that_leave_one_after_another_change_nothing_for_the_others(name):
    """Some layers hold nothing; some models count positions by the columns that they see."""
    oracle, ends = made(name), (1, 12, 4, 30)
    engine = Engine(oracle.loaded, EngineConfig(policy="dynamic", max_batch_size=4, kv_memory=2**23))
    params = [SamplingParams(max_new_tokens=end, ignore_eos=True) for end in ends]
    outputs = engine.generate([prompt_of(n) for n in (60, 5, 9, 3)], params, progress=False)
    for output, end in zip(outputs, ends, strict=True):
        oracle.check(output, end)


def test_a_temperature_by_column_is_refused_when_padded():
    """Llama 4 takes it from the length of the cache, in which a row's padding counts."""
    with pytest.raises(InputError, match="gives other logits when padded far"):
        PaddedRunner(made("llama4").model, 8192, RowPool(100))


# Experts


@pytest.mark.parametrize(
    "name",
    [
        "qwen2-moe",
        "mixtral",
        "granitemoe",
        "gpt_oss",
        "afmoe",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("phimoe", "qwen3_moe", "olmoe", "jetmoe", "hunyuan_v1_moe")
        ),
    ],
)
def test_models_with_experts_run_continuously_and_equal_generate(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*using runner='padded'")
        engine = check(name, policy="continuous")
    assert (engine.config.policy, engine.config.runner) == ("continuous", "packed")


def test_an_option_is_refused_for_its_value():
    model: Callable = made("mixtral").model
    packed, batch = (
        TransformersBackend(model, attention_layers(model), 4),
        Batch([1, 2], [Span(0, 2, 0, [0])], [1]),
    )
    packed.allocate_kv(2)
    assert packed.logits(batch).shape == (1, 256)
    packed.model.config.output_router_logits = True
    with pytest.raises(InputError, match="uses output_router_logits: use runner='padded'"):
        packed.logits(batch)
