"""Every position of a model is usable: a request's last token is not fed back, and so needs none."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import Engine, EngineConfig, InputError, LoadedModel, SamplingParams
from engine.bench.workload import make_workload
from engine.models import kv_bytes_per_token
from tests.oracle import Oracle
from tests.serving import use_cuda_backend

CONTEXT = 32
LENGTHS = [(32, 1), (31, 2), (20, 13), (1, 32), (32, 1), (7, 26)]  # prompt, output: to the last position
GROWS = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
SHORT_LONG = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=CONTEXT)
LONG = dict(rope_type="longrope", rope_theta=1e4, factor=4.0, **SHORT_LONG)
SIZES = dict(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
)
LLAMA = dict(max_position_embeddings=CONTEXT, intermediate_size=128, num_key_value_heads=2, head_dim=16)
KINDS = {
    "gpt2": dict(n_positions=CONTEXT),  # a table of learned positions ends there
    "opt": dict(max_position_embeddings=CONTEXT, ffn_dim=128, word_embed_proj_dim=64),
    "llama": LLAMA,
    "gemma2": LLAMA,
    "llama, dynamic": dict(**LLAMA, rope_parameters=GROWS),  # other angles for all beyond its last
    "llama, longrope": dict(**(LLAMA | {"max_position_embeddings": 4 * CONTEXT}), rope_parameters=LONG),
}


@cache
def made(kind: str) -> Oracle:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind.split(",")[0], **SIZES, **KINDS[kind], eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Oracle(LoadedModel(kind, model, None, "random"))


CONFIGS = [
    dict(policy="sequential"),
    dict(policy="dynamic", max_batch_size=4),
    dict(policy="dynamic", max_batch_size=4, max_step_tokens=20),
    dict(policy="continuous", max_batch_size=4, page_size=5),
    dict(policy="continuous", max_step_tokens=7, page_size=4, tokens=44),  # cut, shared, preempted
    dict(policy="continuous", deterministic=True, page_size=32, tokens=32),  # one request fills it
    dict(policy="continuous", device=True, max_batch_size=4, page_size=5),
    dict(policy="continuous", device=True, max_step_tokens=7, page_size=4, tokens=44),
]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(kind, config, marks=pytest.mark.slow if (i + j) % 2 else ())
        for i, kind in enumerate(KINDS)
        for j, config in enumerate(CONFIGS)
    ],
    ids=str,
)
def test_requests_up_to_the_last_position_equal_generate(monkeypatch, kind, config):
    oracle = made(kind)
    if config.get("deterministic") and kind in ("gpt2", "opt"):
        pytest.skip("its parts are none that are compiled")
    if config.get("device"):
        use_cuda_backend(monkeypatch)
    tokens = {"kv_memory": config["tokens"] * kv_bytes_per_token(oracle.model)} if "tokens" in config else {}
    options = {name: value for name, value in config.items() if name not in ("tokens", "device")}
    engine = Engine(oracle.loaded, EngineConfig(**{"kv_memory": 2**22, **options, **tokens}))
    prompts = [[(5 * at + n + i) % 250 + 3 for at in range(n)] for i, (n, _) in enumerate(LENGTHS)]
    params = [SamplingParams(max_new_tokens=limit, ignore_eos=True) for _, limit in LENGTHS]
    for output, (_, limit) in zip(engine.generate(prompts, params, progress=False), LENGTHS, strict=True):
        assert len(output.token_ids) == limit
        oracle.check(output, limit)
    if "tokens" in config and config["tokens"] == 44:
        assert engine.metrics.counters.preemptions > 0


HOLDERS = [dict(policy="dynamic"), dict(page_size=4), dict(page_size=8, device=True)]


@pytest.mark.parametrize(("prompt", "limit"), [(24, 1), (20, 5), (1, 24)])
@pytest.mark.parametrize("config", HOLDERS, ids=str)
def test_memory_for_what_is_computed_is_enough(monkeypatch, config, prompt, limit):
    if config.get("device"):
        use_cuda_backend(monkeypatch)
    oracle, options = made("llama"), {name: value for name, value in config.items() if name != "device"}
    memory = 24 * kv_bytes_per_token(oracle.model)
    engine = Engine(oracle.loaded, EngineConfig(kv_memory=memory, max_step_tokens=9, **options))
    params = SamplingParams(max_new_tokens=limit, ignore_eos=True)
    for output in engine.generate([[*range(3, 3 + prompt)]] * 3, params, progress=False):
        assert (output.finish_reason, len(output.token_ids)) == ("length", limit)
        oracle.check(output, limit)
    assert engine.scheduler.memory.capacity == 24
    with pytest.raises(InputError, match="needs 25 positions of KV memory; it holds 24"):
        engine.add_request([*range(3, 3 + prompt)], SamplingParams(max_new_tokens=limit + 1))


def test_angles_are_of_the_models_own_positions_alone(monkeypatch):
    """Pages that end beyond the last position must not make a table of angles for a longer text."""
    use_cuda_backend(monkeypatch)
    engine = Engine(made("llama, longrope").loaded, EngineConfig(page_size=5, kv_memory=2**22))
    engine.generate([[5] * CONTEXT], SamplingParams(max_new_tokens=1), progress=False)
    assert [len(table) for table in engine.runner.backend.decoder._tables_GPD] == [CONTEXT]


@pytest.mark.parametrize("policy", ["dynamic", "continuous"])
@pytest.mark.parametrize(("prompt", "limit"), [(33, 1), (32, 2), (1, 33)])
def test_one_position_more_is_refused(policy, prompt, limit):
    engine = Engine(made("gpt2").loaded, EngineConfig(policy=policy, kv_memory=2**22))
    with pytest.raises(
        InputError, match=f"of {prompt} tokens with max_new_tokens={limit} needs 33 positions; gpt2 has 32"
    ):
        engine.add_request([5] * prompt, SamplingParams(max_new_tokens=limit))


def test_a_workload_may_fill_the_context():
    assert make_workload("paper-2", vocab_size=256, max_positions=128 + 256 - 1)
    with pytest.raises(
        InputError, match="max_positions=382 is too small: the longest request of paper-2 needs 383"
    ):
        make_workload("paper-2", vocab_size=256, max_positions=382)
