"""Conversations: a replay gives what its turns give one by one, in any company, and ends as its parts do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from engine import Engine, EngineConfig, InputError, RequestOutput, SamplingParams, WorkItem, Workload
from engine.bench.compare import compare, transformers_generate
from engine.request import Request
from engine.sampling import sample
from engine.step import NON_FINITE
from tests.serving import exactly, packed, prompts_of, use_cuda_backend
from tests.test_detokenizer import byte_level

POLICIES = [
    pytest.param(dict(policy="sequential"), id="sequential"),
    pytest.param(dict(policy="dynamic", runner="padded", max_batch_size=3), id="dynamic-padded"),
    pytest.param(dict(policy="dynamic", max_batch_size=3, page_size=4), id="dynamic"),
    pytest.param(dict(policy="continuous", max_batch_size=2, max_step_tokens=7), id="continuous-2"),
    pytest.param(
        dict(policy="continuous", max_batch_size=8, page_size=4, kv_memory=2**19), id="continuous-8"
    ),
    pytest.param(dict(policy="continuous", prefix_caching=False), id="not-shared"),
]


def tree(seed: int, count: int) -> list[WorkItem]:
    """Conversations that branch: each item follows an earlier one or none, and is due at once or a little
    later."""
    rng = np.random.default_rng(seed)
    items = []
    for index, prompt in enumerate(prompts_of(count, seed, longest=12)):
        before = int(rng.integers(-1, index)) if index else -1
        after_s = float(rng.choice([0.0, 0.002]))
        params = exactly(int(rng.integers(1, 7)))
        items.append(WorkItem(prompt, params, after_s, None if before < 0 else before))
    return items


def whole_prompts(items: Sequence[WorkItem], answers: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The prompt of each item with all before it, given every answer as it goes into what follows."""
    whole: list[tuple[int, ...]] = []
    for item in items:
        before = () if item.follows is None else (*whole[item.follows], *answers[item.follows])
        whole.append((*before, *item.prompt))
    return whole


def replayed(engine: Engine, items: Sequence[WorkItem]) -> list[RequestOutput]:
    outputs = engine.replay(items, progress=False)
    assert not engine.has_work
    assert not engine._requests
    return outputs


@pytest.mark.parametrize("config", POLICIES)
def test_a_conversation_gives_what_its_turns_give_one_by_one(tiny, config):
    oracle = tiny("tiny-llama", "float64")
    items = tree(1, 14)
    assert len({item.follows for item in items}) > 4
    outputs = replayed(Engine(oracle.loaded, EngineConfig(**config)), items)
    whole = whole_prompts(items, [output.token_ids for output in outputs])
    for item, output, prompt in zip(items, outputs, whole, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.token_ids == oracle.answer(prompt, item.params.max_new_tokens)


@pytest.fixture(scope="module")
def engines(tiny) -> Callable[..., Engine]:
    """`engines(config)`: an engine of the tiny Qwen2 in float64 with this of CONFIGS, made once."""
    loaded = tiny("tiny-qwen2", "float64").loaded
    return cache(lambda number: Engine(loaded, EngineConfig(**POLICIES[number].values[0])))


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(0, len(POLICIES) - 1))
def test_any_tree_of_conversations(tiny, engines, seed, count, number):
    oracle, items = tiny("tiny-qwen2", "float64"), tree(seed, count)
    outputs = replayed(engines(number), items)
    answers = [output.token_ids for output in outputs]
    work = Workload("made-up", 0, "all", tuple(items))
    assert [output.prompt_token_ids for output in outputs] == whole_prompts(items, answers)
    assert [work.whole_prompt(index, answers) for index in range(count)] == whole_prompts(items, answers)
    metrics = [output.metrics for output in outputs]
    assert work.lengths() == [(one.prompt_tokens, one.output_tokens) for one in metrics]
    for item, output in zip(items, outputs, strict=True):
        oracle.check(output, item.params.max_new_tokens)
        assert output.metrics.queue_ms >= 0
        if item.follows is not None:  # due when its answer has been there for so long, and never before
            due_s = metrics[item.follows].finished_s + item.arrival_s
            assert output.metrics.arrival_s == pytest.approx(due_s, abs=1e-9)


def test_a_second_turn_finds_the_pages_of_the_first(tiny):
    first, second = prompts_of(2, seed=3, longest=9)
    items = [WorkItem([*first, *range(40)], exactly(20)), WorkItem(second, exactly(4), follows=0)]
    engine = packed(tiny("tiny-llama"), page_size=16)
    before, after = replayed(engine, items)
    cached = after.metrics.prompt_tokens_cached
    assert before.metrics.prompt_tokens_cached == 0
    assert cached == (len(items[0].prompt) + 19) // 16 * 16 > len(items[0].prompt)  # its answer's, too


def test_conversations_where_tokens_come_a_step_late(tiny, monkeypatch):
    oracle, items = tiny("tiny-llama"), tree(3, 8)
    use_cuda_backend(monkeypatch)
    engine = packed(oracle, max_batch_size=4)
    outputs = replayed(engine, items)
    assert [output.prompt_token_ids for output in outputs] == whole_prompts(
        items, [output.token_ids for output in outputs]
    )
    for item, output in zip(items, outputs, strict=True):
        oracle.check(output, item.params.max_new_tokens)


def test_a_stop_token_that_ended_an_answer_is_not_said_twice(tiny):
    oracle = tiny("tiny-llama", "float64")
    engine = Engine(oracle.loaded)
    prompt = prompts_of(1, seed=5)[0]
    free = oracle.answer(prompt, 12)
    at = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
    engine.eos_ids = frozenset({free[at]})
    own = [free[at], 7, 8]
    items = [WorkItem(prompt, SamplingParams(12)), WorkItem(own, exactly(3), follows=0),
             WorkItem(own, exactly(3), follows=1)]  # fmt: skip
    stopped, second, third = replayed(engine, items)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", free[: at + 1])
    assert second.prompt_token_ids == (*prompt, *free[:at], *own)
    assert third.prompt_token_ids == (*second.prompt_token_ids, *second.token_ids, *own)  # that one ran out
    assert second.token_ids == oracle.answer(second.prompt_token_ids, 3)


def test_text_goes_on_without_what_begins_a_text(tiny):
    class Beginning:
        """Begins a text with token 2 unless told not to."""

        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            ids = byte_level(256)(text).input_ids
            return type("Encoded", (), {"input_ids": [2] * add_special_tokens + ids})

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_level(256), name)

    loaded = replace(tiny().loaded, tokenizer=Beginning())
    items = [WorkItem("One, two,", exactly(2)), WorkItem(" four.", exactly(2), follows=0)]
    first, second = replayed(Engine(loaded), items)
    new = tuple(byte_level(256)(" four.").input_ids)
    assert first.prompt_token_ids[0] == 2
    assert second.prompt_token_ids == (*first.prompt_token_ids, *first.token_ids, *new)


# How conversations end


def chain(count: int, tokens: int = 6) -> list[WorkItem]:
    """One conversation, and a neighbour that has nothing to do with it at the end."""
    prompts = prompts_of(count + 1, seed=2, longest=8)
    turns = [WorkItem(prompts[i], exactly(tokens), 0.0, i - 1 if i else None) for i in range(count)]
    return [*turns, WorkItem(prompts[count], exactly(9))]


def test_what_follows_a_request_that_failed_fails_like_it(tiny, monkeypatch):
    oracle = tiny("tiny-llama")

    def faulty(logits, requests: Sequence[Request]):
        known = sample(logits, requests)
        return [NON_FINITE if request.id == "request-1" else choice for request, choice in
                zip(requests, known, strict=True)]  # fmt: skip

    engine = Engine(oracle.loaded, EngineConfig(policy="dynamic", runner="padded", max_batch_size=3))
    monkeypatch.setattr("engine.runner.padded.sample", faulty)
    first, second, third, fourth, other = replayed(engine, chain(4))
    assert [output.finish_reason for output in (first, second, third, fourth)] == ["length"] + ["error"] * 3
    for output in (third, fourth):
        told = f"{output.request_id} comes after request-1, which ended with reason error: {second.error}"
        assert output.error == told
    assert third.token_ids == fourth.token_ids == ()
    assert list(third.prompt_token_ids) == list(chain(4)[2].prompt)  # what is known of it
    assert (third.metrics.latency_ms, third.metrics.queue_ms) == (0.0, None)
    for output in (first, other):
        oracle.check(output, len(output.token_ids))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_what_follows_a_request_that_was_aborted_is_aborted(tiny, victim):
    """Whether it runs, or waits for an answer itself."""
    oracle = tiny("tiny-llama")
    engine, items = Engine(oracle.loaded), chain(3)
    steps = []

    def on_step(chunks):
        steps.append(chunks)
        if len(steps) == 2:
            engine.abort(f"request-{victim}")

    *turns, other = engine.replay(items, progress=False, on_step=on_step)
    assert not engine._requests
    assert [output.finish_reason for output in turns] == ["length"] * victim + ["abort"] * (3 - victim)
    assert turns[victim].error is None
    for index in range(victim + 1, 3):
        told = f"request-{index} comes after request-{victim}, which ended with reason abort"
        assert turns[index].error == told
    assert all(output.metrics.latency_ms >= 0 for output in turns)
    oracle.check(other, 9)


def test_ctrl_c_leaves_no_conversation_half_done(tiny):
    def interrupt(chunks):
        raise KeyboardInterrupt

    engine = Engine(tiny().loaded)
    outputs = engine.replay(chain(3), progress=False, on_step=interrupt)
    assert [output.finish_reason for output in outputs] == ["abort"] * 4
    assert not engine._requests
    assert not engine.has_work
    assert all(0 <= output.metrics.latency_ms < 1e6 for output in outputs)


# What is refused, before any work


def test_a_conversation_must_fit_at_its_longest(tiny):
    def items(last: int) -> list[WorkItem]:  # of 5 + 10 + 7 tokens, and an answer
        return [WorkItem([3] * 5, exactly(10)), WorkItem([4] * 7, exactly(last), follows=0)]

    small = packed(tiny(), kv_tokens=32, page_size=16)
    assert len(replayed(small, items(11))[1].token_ids) == 11  # the last token takes no position
    large = Engine(tiny().loaded)
    for engine, last, message in (
        (small, 12, "a prompt of 22 tokens with max_new_tokens=12 needs 33 positions of KV memory"),
        (
            large,
            large.max_positions - 20,
            r"^prompts\[1\] with what it follows of 22 tokens with max_new_tok",
        ),
    ):
        steps = engine.metrics.counters.steps
        with pytest.raises(InputError, match=message):
            engine.replay(items(last), progress=False)
        assert engine.metrics.counters.steps == steps
        assert not engine._requests


@given(st.lists(st.none() | st.integers(-2, 6), min_size=1, max_size=6))
def test_only_earlier_items_are_followed(engines, follows):
    items = [WorkItem([3], exactly(1), follows=before) for before in follows]
    bad = [i for i, before in enumerate(follows) if before is not None and not 0 <= before < i]
    engine = engines(0)
    if not bad:
        assert len(Workload("made-up", 0, "all", tuple(items)).items) == len(replayed(engine, items))
        return
    told = rf"^items\[{bad[0]}\].follows={follows[bad[0]]} must be the index of an earlier item, or None$"
    for call in (lambda: engine.replay(items, progress=False), lambda: Workload("a", 0, "all", tuple(items))):
        with pytest.raises(InputError, match=told):
            call()


@pytest.mark.parametrize("before", [True, "0", 0.0, [0]])
def test_an_index_is_a_whole_number(engines, before):
    items = [WorkItem([3], exactly(1)), WorkItem([3], exactly(1), follows=before)]
    with pytest.raises(InputError, match=r"^items\[1\].follows=.* must be the index of an earlier item"):
        engines(0).replay(items, progress=False)


def test_an_index_of_numpy_is_as_good(engines):
    items = [WorkItem([3], exactly(1)), WorkItem([4], exactly(1), follows=np.int64(0))]
    assert replayed(engines(0), items)[1].metrics.prompt_tokens == 3


# In the comparison


def test_policies_hold_the_same_conversations_and_generate_none(tiny):
    loaded = tiny("tiny-llama", "float64").loaded
    work = Workload("made-up", 0, "all", tuple(tree(4, 8)))
    pairs = [("sequential", 1), ("dynamic", 4), ("continuous", 4)]
    runs = list(compare(loaded, work, pairs, EngineConfig()))
    tokens = {tuple(output.token_ids for output in run.outputs) for run in runs}
    assert len(tokens) == 1
    with pytest.raises(
        InputError, match=r"items\[\d\] follows items\[\d\], and generate holds no conversations"
    ):
        transformers_generate(Engine(loaded), work.items, 4)


def test_padded_batches_take_requests_when_they_are_due(tiny):
    oracle = tiny("tiny-llama")
    items = [
        WorkItem(prompt, exactly(2), at) for prompt, at in zip(prompts_of(3), (0.05, 0.0, 0.02), strict=True)
    ]
    outputs, metrics = transformers_generate(Engine(oracle.loaded), items, 2)
    assert [record.request_id for record in metrics.records] == ["request-1", "request-2", "request-0"]
    for output in outputs:
        oracle.check(output, 2)
