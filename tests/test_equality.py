"""Batched output equals `model.generate`, one prompt at a time, token for token: whatever the runner, the
policy, the model, the dtype, the batch, the chunks, the pages, the cache and the memory.

Runners: padded; packed, which compiles a model built like Llama; device, packed with the backend for a GPU by
way of the reference functions, whose steps are launched before the one before is read.
"""

from __future__ import annotations

import logging
from itertools import product

import pytest
from hypothesis import Phase, given, settings, strategies as st

from engine import Engine, EngineConfig, SamplingParams, WorkItem
from engine.backends.cuda.backend import CudaBackend
from engine.bench.workload import make_workload
from engine.models import kv_bytes_per_token
from engine.runner.packed import PackedRunner
from engine.runner.padded import PaddedRunner
from tests.oracle import Oracle
from tests.pairwise import pairwise
from tests.serving import (
    NAMES,
    SETTINGS,
    check_shuffled,
    drive,
    exactly,
    prompts_of,
    use_cuda_backend,
    use_reference_kernels,
    work_of,
)

RUNNERS = ("padded", "packed", "device")
POLICIES = ("sequential", "dynamic", "continuous")
HOW = [way for way in product(RUNNERS, POLICIES) if way != ("padded", "continuous")]
DTYPES = ("float32", "float64")
slow = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _reference_kernels():
    with pytest.MonkeyPatch.context() as patch:
        use_reference_kernels(patch)
        yield


def build(oracle: Oracle, runner: str, kv_tokens: int | None = None, **config) -> Engine:
    """Build an engine on one of RUNNERS, with KV memory for so many tokens."""
    memory = (kv_tokens or 20_000) * kv_bytes_per_token(oracle.model)
    own = {"runner": "padded" if runner == "padded" else "packed", "kv_memory": memory}
    with pytest.MonkeyPatch.context() as patch:
        if runner == "device":
            use_cuda_backend(patch)
        engine = Engine(oracle.loaded, EngineConfig(**own, **config))
    assert type(engine.runner) is (PaddedRunner if runner == "padded" else PackedRunner)
    assert runner == "padded" or isinstance(engine.runner.backend, CudaBackend) == (runner == "device")
    return engine


# Little memory: for the longest request and little more, or two pages.
COVER = pairwise(
    HOW, NAMES, DTYPES, (1, 3, 8, 24), (8192, 2, 7, 64), (16, 1, 3, 256), (True, False), (None, 48)
)
# What the plain run leaves out: each way, and each batch of the padded runner, with every model.
FULL = [
    *product([("packed", "continuous"), ("device", "continuous")], NAMES, DTYPES, SETTINGS),
    *product(
        [("padded", "dynamic")], NAMES, DTYPES, [(batch, 8192, 16, True, None) for batch in (1, 3, 8, 32)]
    ),
]
CASES = [
    *(pytest.param(*row, id="-".join(map(str, (*row[0], *row[1:])))) for row in COVER),
    *(pytest.param(*row, *way, id="-".join(map(str, (*row[0], *row[1:], *way))), marks=slow)
      for *row, way in FULL),
]  # fmt: skip


@pytest.mark.parametrize(("how", "name", "dtype", "batch", "chunk", "page", "caching", "kv_tokens"), CASES)
def test_equals_generate_one_by_one(tiny, caplog, how, name, dtype, batch, chunk, page, caching, kv_tokens):
    (runner, policy), oracle = how, tiny(name, dtype)
    options = dict(max_batch_size=batch, max_step_tokens=chunk, page_size=page, prefix_caching=caching)
    kv_tokens = kv_tokens and max(kv_tokens, 2 * page)
    with caplog.at_level(logging.WARNING):
        engine = build(oracle, runner, kv_tokens, policy=policy, **options)
    assert not caplog.records, "it runs as it is meant to"
    check_shuffled(oracle, engine, batch, chunk)
    counters = engine.metrics.counters
    assert max(counters.batch_sizes) <= (1 if policy == "sequential" else batch)
    if runner == "padded":
        return
    assert counters.padded_tokens == 0
    if kv_tokens in (48, 200) and page == 1 and batch > 1 and policy != "sequential":
        assert counters.preemptions > 0
    if not caching:
        assert counters.prompt_tokens_cached == 0
    elif page <= 16 and kv_tokens is None and batch > 1:
        assert counters.prompt_tokens_cached > 0


@settings(max_examples=2 * settings().max_examples, phases=[Phase.explicit, Phase.generate])
@given(
    picks=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 8)), min_size=1, max_size=14),
    how=st.sampled_from(HOW),
    batch=st.integers(1, 12),
    chunk=st.integers(1, 60) | st.integers(60, 200),
    pass_tokens=st.integers(0, 100),
    page=st.sampled_from([1, 2, 3, 8, 16, 50]),
    extra=st.integers(0, 120),
    caching=st.booleans(),
    every=st.integers(1, 4),
    aborts=st.sets(st.integers(0, 13), max_size=3),
    stop=st.sets(st.integers(0, 255), max_size=40),
    name=st.sampled_from(NAMES),
)
def test_any_joins_leaves_preemptions_and_aborts(
    tiny, picks, how, batch, chunk, pass_tokens, page, extra, caching, every, aborts, stop, name
):
    (runner, policy), oracle = how, tiny(name, "float64")
    work = [(work_of(16)[i][0], limit) for i, limit in picks]
    kv_tokens = -(-max(len(prompt) + limit for prompt, limit in work) // page) * page + extra
    options = dict(max_batch_size=batch, max_step_tokens=chunk, page_size=page, prefix_caching=caching)
    engine = build(oracle, runner, kv_tokens, policy=policy, **options)
    if runner == "padded":
        engine.runner.pass_tokens = pass_tokens
    memory, requests, steps = engine.scheduler.memory, [], 0
    while len(requests) < len(work) or engine.has_work:
        for prompt, limit in work[len(requests) : len(requests) + every]:
            params = SamplingParams(max_new_tokens=limit, stop_token_ids=tuple(stop), ignore_eos=True)
            requests.append(engine.add_request(prompt, params))
        engine.step()
        steps += 1
        assert steps < 5000
        if steps % 3 == 0 and steps // 3 in aborts and steps // 3 < len(requests):
            engine.abort(requests[steps // 3].id)
        if runner != "padded":
            memory.check_integrity()
    for request, (prompt, limit) in zip(requests, work, strict=True):
        answer = oracle.answer(prompt, 8)[:limit]
        ends = [i for i, token in enumerate(answer) if token in stop]
        answer = answer[: ends[0] + 1] if ends else answer
        found = request.result.token_ids
        assert found == (answer[: len(found)] if request.result.finish_reason == "abort" else answer)
    counters = engine.metrics.counters
    if runner != "padded":
        assert memory.pages_used == 0
    elif not aborts:
        outputs = sum(len(request.result.token_ids) for request in requests)
        assert counters.output_tokens == outputs
        assert counters.tokens_computed == sum(len(prompt) for prompt, _ in work) + outputs - len(work)


@pytest.mark.parametrize(
    ("runner", "name", "dtype"),
    [
        ("packed", "tiny-qwen3", "float32"),
        ("packed", "tiny-llama", "float64"),
        ("device", "tiny-llama", "float64"),
    ],
)
def test_preempted_requests_resume_in_other_pages(tiny, runner, name, dtype):
    """While others hold the pages that they had."""
    oracle = tiny(name, dtype)
    work = [(prompt[: 1 + 5 * i % 19], 8 + 7 * i % 23) for i, prompt in enumerate(prompts_of(16))]
    options = dict(max_batch_size=4, page_size=2, prefix_caching=False, max_step_tokens=16)
    engine = build(oracle, runner, 60, policy="continuous", **options)
    for output, (_, limit) in zip(drive(engine, work, every=3), work, strict=True):
        oracle.check(output, limit)
    assert engine.metrics.counters.preemptions > 8


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (("padded", "dynamic"), "tiny-gemma3"),
        (("packed", "dynamic"), "tiny-qwen2"),
        (("packed", "continuous"), "tiny-llama"),
        *((("device", "continuous"), name) for name in NAMES),
    ],
    ids=str,
)
def test_eos_ends_a_request_in_the_midst_of_others(tiny, how, name):
    """On a device it is seen a step late, and no token more comes out."""
    (runner, policy), oracle = how, tiny(name, "float64")
    prompts = [prompt for prompt, _ in work_of(16)]
    eos = tuple(dict.fromkeys(oracle.answer(prompt, 12)[i % 7] for i, prompt in enumerate(prompts)))[:4]
    engine = build(oracle, runner, 400, policy=policy, max_batch_size=6, page_size=4)
    engine.eos_ids = frozenset(eos[:2])
    params = SamplingParams(max_new_tokens=12, stop_token_ids=eos[2:])
    for _ in range(2):  # the second time with pages that the first left behind
        outputs = engine.generate(prompts, params, progress=False)
        for output in outputs:
            oracle.check(output, 12, eos)
            ended = output.token_ids[-1] in eos
            assert output.finish_reason == ("stop" if ended else "length")
            assert output.stop_reason == (output.token_ids[-1] if ended else None)
        assert {output.finish_reason for output in outputs} == {"stop", "length"}
        while engine.has_work:
            engine.step()
        if runner != "padded":
            engine.scheduler.memory.check_integrity()
            assert engine.scheduler.memory.pages_used == 0
    assert engine.metrics.counters.output_tokens == 2 * sum(len(output.token_ids) for output in outputs)


@pytest.mark.parametrize(
    ("runner", "policy", "batch", "count"),
    [
        ("packed", "continuous", 3, 4),
        *(pytest.param("padded", "dynamic", batch, 12, marks=slow) for batch in (3, 8, 32)),
        pytest.param("packed", "continuous", 8, 12, marks=slow),
    ],
)
def test_equals_generate_on_a_real_model(smollm2, runner, policy, batch, count):
    oracle = Oracle(smollm2)
    work = make_workload(
        f"chat-{count}", vocab_size=oracle.model.config.vocab_size, tokenizer=smollm2.tokenizer
    )
    limits = [3 + i % 5 for i in range(count)]
    engine = build(oracle, runner, 4000, policy=policy, max_batch_size=batch, max_step_tokens=128)
    items = [WorkItem(item.prompt, exactly(limit)) for item, limit in zip(work.items, limits, strict=True)]
    for output, limit in zip(engine.replay(items, progress=False), limits, strict=True):
        oracle.check(output, limit)
