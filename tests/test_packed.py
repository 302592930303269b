"""The packed runner: shared prefixes, the same bits in any company, and faults that stay where they are."""

from __future__ import annotations

import doctest
import gc
import warnings

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import engine.step
from engine import Engine, EngineConfig, InputError
from engine.bench.workload import make_workload
from engine.models import load
from tests.oracle import Oracle
from tests.serving import drive, exactly, packed, work_of


def test_the_example_of_a_batch_is_right():
    assert doctest.testmod(engine.step).attempted == 3
    assert doctest.testmod(engine.step).failed == 0


def test_a_shared_prefix_is_computed_once(tiny):
    oracle: Oracle = tiny("tiny-llama")
    items = make_workload("shared-prefix-64", vocab_size=256).items
    engine = packed(oracle, 30_000, max_batch_size=16)
    plain = packed(oracle, 30_000, max_batch_size=16, prefix_caching=False)
    expected = [output.token_ids for output in plain.replay(items, progress=False)]
    prompt_tokens = sum(len(item.prompt) for item in items)
    computed = []
    for _ in range(2):
        before = engine.metrics.counters.tokens_computed
        outputs = engine.replay(items, progress=False)
        assert [output.token_ids for output in outputs] == expected
        decodes = sum(len(output.token_ids) - 1 for output in outputs)
        computed.append(engine.metrics.counters.tokens_computed - before - decodes)
        cached = sum(output.metrics.prompt_tokens_cached for output in outputs)
        assert computed[-1] == prompt_tokens - cached
    assert computed[1] < 0.4 * prompt_tokens, "the second time"
    for output in outputs[::16]:
        oracle.check(output, len(output.token_ids))


@pytest.mark.parametrize(
    ("dtype", "page"), [("float32", 4), ("float32", 16), ("float32", 24), ("float64", 5)]
)
def test_pages_take_no_more_memory_than_they_may(tiny, dtype, page):
    each = Engine(tiny("tiny-llama", dtype).loaded, EngineConfig(kv_memory=2**20, page_size=page))
    assert 0.95 * 2**20 < each.runner.memory.pages * each.runner.backend.page_bytes <= 2**20


def test_little_memory_is_held_without_need(tiny):
    engine = packed(tiny("tiny-llama"), 30_000, page_size=16)
    engine.replay(make_workload("mixed-64", vocab_size=256).items, progress=False)
    assert engine.metrics.counters.kv_unused_mean <= 8


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("tiny-llama", 16),
        ("tiny-gemma3", 4),
        ("tiny-qwen2", 4),
        *(pytest.param(*more, marks=pytest.mark.slow)
          for more in (("tiny-llama", 4), ("tiny-gemma3", 16), ("tiny-qwen2", 16))),
    ],
)  # fmt: skip
def test_deterministic_means_the_same_bits_in_any_company(tiny, name, page):
    """Alone, cut into chunks, after a cache hit, preempted, in large and small batches: the logits are
    equal."""
    oracle: Oracle = tiny(name)
    work = work_of(12, seed=3)

    def run(chosen, kv_tokens=None, twice=False, **options):
        engine = packed(oracle, kv_tokens, deterministic=True, page_size=page, **options)
        for _ in range(1 + twice):
            prompts, params = [work[i][0] for i in chosen], [exactly(work[i][1], logprobs=5) for i in chosen]
            outputs = engine.generate(prompts, params, progress=False)
        return {
            i: (o.token_ids, o.logprobs) for i, o in zip(chosen, outputs, strict=True)
        }, engine.metrics.counters

    alone = {i: run([i])[0][i] for i in range(len(work))}
    everyone = list(range(len(work)))
    for options in (
        dict(max_batch_size=12),
        dict(max_batch_size=3, max_step_tokens=5, prefix_caching=False),
        dict(max_batch_size=12, max_step_tokens=33, twice=True),
        dict(max_batch_size=12, max_step_tokens=40, kv_tokens=112),
        dict(max_batch_size=5, policy="dynamic", max_step_tokens=1000),
    ):
        found, counters = run(everyone, **options)
        assert found == alone, options
        if options.get("kv_tokens") and page == 4:
            assert counters.preemptions > 0
        if options.get("twice"):
            assert counters.prompt_tokens_cached > 0
    assert run([5, 2, 9], max_step_tokens=17)[0] == {i: alone[i] for i in (5, 2, 9)}


def test_a_model_without_the_interface_falls_back_with_a_warning(tiny, monkeypatch):
    oracle: Oracle = tiny("tiny-llama")
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM .*runner='padded' and policy='dynamic': .*"):
        engine = Engine(oracle.loaded)
    assert (engine.config.runner, engine.config.policy) == ("padded", "dynamic")
    assert engine.config.max_step_tokens == 8192, "what suits padded, not what suited packed"
    (output,) = engine.generate([[5, 6, 7]], exactly(6), progress=False)
    oracle.check(output, 6)
    for config in (dict(runner="packed"), dict(deterministic=True)):
        with pytest.raises(InputError, match="LlamaForCausalLM"):
            Engine(oracle.loaded, EngineConfig(**config))


def test_a_model_that_runs_packed_gives_no_warning(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = Engine(tiny().loaded).config
    assert (config.runner, config.max_step_tokens) == ("packed", 512)


def test_padded_cannot_be_continuous():
    with pytest.raises(InputError, match="runner='padded' can be neither continuous"):
        EngineConfig(runner="padded", policy="continuous")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_nan_fails_its_request_alone_and_its_pages_poison_nobody(name):
    oracle = Oracle(load(f"random:{name}"))
    engine, weight_VM = packed(oracle, 160, max_batch_size=3), oracle.model.get_input_embeddings().weight
    work = [([min(token, 250) for token in prompt], limit) for prompt, limit in work_of(16)]
    prompts = [prompt for prompt, _ in work[:3]]
    prompts[1] = [251, *prompts[1]]
    requests = [engine.add_request(prompt, exactly(6)) for prompt in prompts]
    sound_M = weight_VM[251].clone()
    weight_VM[251] = torch.nan  # a token of the second request alone
    engine.step()
    weight_VM[251] = sound_M
    while engine.has_work:
        engine.step()
    assert requests[1].result.finish_reason == "error"
    assert "NaN" in requests[1].result.error
    for i in (0, 2):
        oracle.check(requests[i].result, 6)
    again = [(prompts[1], 6), *work]  # the same prompt again, and enough others to use every page
    for output, (_, limit) in zip(drive(engine, again), again, strict=True):
        oracle.check(output, limit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("caching", [False, True])
def test_nan_of_a_request_that_is_aborted_in_its_prompt_poisons_nobody(dtype, caching):
    """Nobody knows of it, for no token was drawn; the next request gets its pages."""
    oracle = Oracle(load("random:tiny-llama", dtype=dtype))
    engine = packed(oracle, 64, page_size=4, max_step_tokens=4, prefix_caching=caching)
    oracle.model.get_input_embeddings().weight[251] = torch.nan
    bad = engine.add_request([251] * 9 + [20] * 30, exactly(3))
    for _ in range(4):
        engine.step()
    engine.abort(bad.id)
    for start in (11, 40):
        (output,) = engine.generate([[*range(start, start + 30)]], exactly(6), progress=False)
        oracle.check(output, 6)


def test_logits_of_a_text_leave_nothing_behind(tiny, monkeypatch):
    """Neither pages that are found, nor a store of another size where they are interrupted."""
    oracle: Oracle = tiny("tiny-llama")
    engine, prompt = packed(oracle, 400), [*range(3, 43)]
    for _ in range(2):
        oracle.check(engine.generate([prompt], exactly(5), progress=False)[0], 5)
        engine.runner.logits(prompt[:20])
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.backend, "logits", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.runner.logits([5])
    for output in engine.generate([prompt, prompt[:9]], exactly(5), progress=False):
        oracle.check(output, 5)
    engine.add_request(prompt, exactly(5))
    engine.step()
    with pytest.raises(RuntimeError, match="requests hold pages"):
        engine.runner.logits(prompt)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_nan_logits_fail_their_request_alone(tiny, name, monkeypatch):
    oracle: Oracle = tiny(name)
    engine = packed(oracle, 160)
    work = work_of(4)

    def poisoned(batch):
        logits_RV = right(batch)
        logits_RV[2] = torch.nan
        return logits_RV

    requests = [engine.add_request(prompt, exactly(5)) for prompt, _ in work]
    right = engine.runner.backend.logits
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.backend, "logits", poisoned)
        engine.step()
    while engine.has_work:
        engine.step()
    assert [request.result.finish_reason for request in requests] == ["length", "length", "error", "length"]
    for i in (0, 1, 3):
        oracle.check(requests[i].result, 5)


def test_two_engines_on_one_model_leave_it_as_it_was(tiny):
    oracle: Oracle = tiny("tiny-llama")
    kept = oracle.model.config._attn_implementation
    engines = [packed(oracle), packed(oracle)]
    assert oracle.model.config._attn_implementation == kept, "the original still runs as it did"
    gc.collect()
    for each in engines:
        (output,) = each.generate([[5, 6, 7]], exactly(5), progress=False)
        oracle.check(output, 5)
