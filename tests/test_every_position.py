"""Every position of a model is usable: a request's last token is not fed back, and so needs none."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import Engine, EngineConfig, InputError, LoadedModel, SamplingParams
from engine.models import kv_bytes_per_token
from engine.workload import make
from tests.oracle import Oracle

CONTEXT = 32
LENGTHS = [(32, 1), (31, 2), (20, 13), (1, 32), (32, 1), (7, 26)]  # prompt, output: to the last position
SIZES = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
KINDS = {
    "gpt2": dict(n_positions=CONTEXT),  # a table of learned positions ends there
    "llama": dict(max_position_embeddings=CONTEXT, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    "gemma2": dict(max_position_embeddings=CONTEXT, intermediate_size=128, num_key_value_heads=2, head_dim=16),
}


@cache
def made(kind: str) -> Oracle:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind], eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Oracle(LoadedModel(kind, model, None, "random"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        dict(policy="sequential"),
        dict(policy="dynamic", max_batch_size=4),
        dict(policy="dynamic", max_batch_size=4, max_step_tokens=20),
        dict(policy="continuous", max_batch_size=4, page_size=5),
        dict(policy="continuous", max_step_tokens=7, page_size=4, tokens=44),  # cut, shared, preempted
        dict(policy="continuous", deterministic=True, page_size=32, tokens=32),  # one request fills it
    ],
    ids=str,
)
def test_requests_up_to_the_last_position_equal_generate(kind, config):
    oracle = made(kind)
    tokens = {"kv_memory": config["tokens"] * kv_bytes_per_token(oracle.model)} if "tokens" in config else {}
    options = {name: value for name, value in config.items() if name != "tokens"}
    engine = Engine(oracle.loaded, EngineConfig(**{"kv_memory": 2**22, **options, **tokens}))
    prompts = [[(5 * at + n + i) % 250 + 3 for at in range(n)] for i, (n, _) in enumerate(LENGTHS)]
    params = [SamplingParams(max_new_tokens=limit, ignore_eos=True) for _, limit in LENGTHS]
    for output, (_, limit) in zip(engine.generate(prompts, params, progress=False), LENGTHS, strict=True):
        assert len(output.token_ids) == limit
        oracle.check(output, limit)
    if "tokens" in config and config["tokens"] == 44:
        assert engine.metrics.counters.preemptions > 0


@pytest.mark.parametrize("policy", ["dynamic", "continuous"])
@pytest.mark.parametrize(("prompt", "limit"), [(33, 1), (32, 2), (1, 33)])
def test_one_position_more_is_refused(policy, prompt, limit):
    engine = Engine(made("gpt2").loaded, EngineConfig(policy=policy, kv_memory=2**22))
    with pytest.raises(
        InputError, match=f"of {prompt} tokens with max_new_tokens={limit} needs 33 positions; gpt2 has 32"
    ):
        engine.add_request([5] * prompt, SamplingParams(max_new_tokens=limit))


def test_a_workload_may_fill_the_context():
    assert make("paper-2", vocab_size=256, max_positions=128 + 256 - 1)
    with pytest.raises(InputError, match="max_positions=382 is too small: the longest request of paper-2 needs 383"):
        make("paper-2", vocab_size=256, max_positions=382)
