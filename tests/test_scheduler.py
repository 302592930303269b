"""The scheduler over real page accounting: who is admitted, who goes first, who is preempted."""

from __future__ import annotations

import gc
import sys

import pytest

from engine import InputError, SamplingParams
from engine.kv_pool import PagePool
from engine.request import FinishReason, Request
from engine.scheduler import Scheduler, Step

POLICIES = ("sequential", "dynamic", "continuous")


def request_of(
    name: object, prompt: list[int], max_new_tokens: int = 4, stop: frozenset[int] = frozenset()
) -> Request:
    return Request(str(name), len(prompt), SamplingParams(max_new_tokens=max_new_tokens), list(prompt), stop)


def scheduler_of(
    policy="continuous", batch_size=8, step_tokens=16, pages=64, page_size=4, caching=True
) -> Scheduler:
    return Scheduler(policy, batch_size, step_tokens, PagePool(pages, page_size, caching))


def advance(scheduler: Scheduler, step: Step) -> None:
    tokens = [5 if r.computed + n == len(r.tokens) else None for r, n in step]
    scheduler.advance(step)
    scheduler.commit(step, tokens, 0.0)
    for request, _ in step:
        if request.finish_reason is not None:
            scheduler.release(request)


@pytest.mark.parametrize("policy", POLICIES)
def test_admits_in_order_of_arrival(policy):
    scheduler = scheduler_of(policy, batch_size=2)
    requests = [request_of(i, [i] * 3, 1 + i % 3) for i in range(7)]
    for request in requests:
        scheduler.add(request)
    order = []
    while scheduler.has_work:
        step = scheduler.plan(float(len(order)))
        order += [request for request, _ in step if request not in order]
        advance(scheduler, step)
    assert order == requests
    assert [r.scheduled for r in requests] == sorted(r.scheduled for r in requests)


def test_the_oldest_that_finds_no_room_is_not_overtaken():
    scheduler = scheduler_of(pages=5, caching=False)
    for request in (request_of("a", [1] * 12, 3), request_of("big", [2] * 12), request_of("small", [3])):
        scheduler.add(request)
    assert [r.id for r, _ in scheduler.plan(0.0)] == ["a"]


def test_policies_differ_in_who_joins_a_running_batch():
    joined = {}
    for policy in POLICIES:
        scheduler = scheduler_of(policy)
        scheduler.add(request_of("first", [1]))
        scheduler.add(request_of("second", [2]))
        advance(scheduler, scheduler.plan(0.0))
        scheduler.add(request_of("late", [3]))
        joined[policy] = [r.id for r, _ in scheduler.plan(0.0)]
    assert joined == {
        "sequential": ["first"],
        "dynamic": ["first", "second"],
        "continuous": ["first", "second", "late"],
    }


def test_decodes_go_before_prompts_and_prompts_share_what_is_left():
    scheduler = scheduler_of(step_tokens=10)
    decoding = [request_of(i, [i]) for i in range(3)]
    scheduler.add(long := request_of("long", [9] * 30))
    advance(scheduler, scheduler.plan(0.0))  # the long one is older, and yet they go first once they decode
    for request in decoding:
        scheduler.add(request)
    for _ in range(2):
        advance(scheduler, scheduler.plan(0.0))
    assert long.computed == 30
    scheduler.add(request_of("p", [7] * 8))
    scheduler.add(request_of("q", [8] * 8))
    step = [(r.id, n) for r, n in scheduler.plan(0.0)]
    advancing = 1 + sum(r in scheduler.running for r in decoding)
    assert step[:advancing] == [("long", 1), *[(r.id, 1) for r in decoding if r in scheduler.running]]
    assert sum(n for _, n in step) == 10


def test_a_long_prompt_does_not_stop_decodes_nor_do_short_ones_stop_it():
    scheduler = scheduler_of(batch_size=6, step_tokens=8, pages=200)
    scheduler.add(short := request_of("decodes", [1], 60))
    advance(scheduler, scheduler.plan(0.0))
    scheduler.add(long := request_of("long", list(range(100)), 2))
    for i in range(60):
        scheduler.add(request_of(i, [50 + i], 3))  # one more arrives at every step
        before = short.output_len, long.computed
        step = scheduler.plan(0.0)
        advance(scheduler, step)
        if short.finish_reason is None:
            assert short.output_len == before[0] + 1
        assert long.finish_reason is not None or long.computed > before[1]
    assert long.finish_reason is FinishReason.LENGTH


def test_the_youngest_is_preempted_keeps_its_tokens_and_resumes_later():
    scheduler = scheduler_of(pages=4, page_size=2, caching=False)
    requests = [request_of("old", [1, 1, 1], 4), request_of("young", [2, 2, 2], 4)]
    for request in requests:
        scheduler.add(request)
    old, young = requests
    while young.preemptions == 0:
        assert len(young.tokens) < young.max_len
        kept = list(young.tokens)
        step = scheduler.plan(0.0)
        advance(scheduler, step)
    assert [r for r, _ in step] == [old], "not admitted by the plan that preempted it"
    assert (young.tokens, young.computed, old.preemptions) == (kept, 0, 0)
    assert scheduler.waiting[0] is young
    while scheduler.has_work:
        advance(scheduler, scheduler.plan(0.0))
        scheduler.memory.check_integrity()
    assert [r.output_len for r in requests] == [4, 4]
    assert young.scheduled == 0.0


def test_a_preempted_request_goes_before_those_that_came_later():
    scheduler = scheduler_of(pages=4, page_size=2, caching=False)
    for name in ("a", "b"):
        scheduler.add(request_of(name, [1, 1, 1], 4))
    scheduler.add(request_of("late", [3], 1))
    finished = []
    while scheduler.has_work:
        step = scheduler.plan(0.0)
        advance(scheduler, step)
        finished += [r.id for r, _ in step if r.finish_reason is not None]
    assert finished[0] == "a"
    assert set(finished) == {"a", "b", "late"}


@pytest.mark.parametrize("limit", [7, 6])
def test_what_can_never_fit_is_refused(limit):
    scheduler = scheduler_of(pages=2, page_size=5)
    request = request_of("huge", [1] * 5, limit)
    if limit == 6:
        scheduler.memory.check(request)
    else:
        with pytest.raises(
            InputError, match=r"request huge: a prompt of 5 tokens .* needs 11 positions .* holds 10"
        ):
            scheduler.memory.check(request)


def test_a_request_that_ended_since_the_plan_is_passed_over():
    scheduler = scheduler_of()
    scheduler.add(gone := request_of("gone", [1, 2]))
    scheduler.add(stays := request_of("stays", [3, 4]))
    step = scheduler.plan(0.0)
    scheduler.advance(step)
    gone.finish(FinishReason.ABORT)
    scheduler.release(gone)
    scheduler.commit(step, [7, 8], 0.0)
    assert (gone.output_ids, stays.output_ids) == ([], [8])


@pytest.mark.parametrize("steps", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_steps_keep_memory_flat(steps):
    scheduler = scheduler_of(batch_size=2, pages=12, page_size=4)
    blocks = []
    for i in range(steps + 1):
        if len(scheduler.waiting) + len(scheduler.running) < 3:
            scheduler.add(request_of(i, [i % 7, i % 5, i % 11, i % 3, i % 13], 12))
        advance(scheduler, scheduler.plan(0.0))
        if i % (steps // 2) == steps // 5:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    gc.collect()
    blocks.append(sys.getallocatedblocks())
    assert max(blocks) - blocks[0] < 2_000, blocks
