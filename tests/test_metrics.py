"""Metrics: every number has one definition, checked on timelines whose answers are known."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import pytest

from engine.metrics import LATENCIES, Counters, EngineMetrics, RequestMetrics
from engine.request import FinishReason, Request, SamplingParams
from engine.step import Choice, StepResult


def record(
    *,
    arrival: float,
    scheduled: float | None,
    times: tuple[float, ...],
    finished: float,
    reason: str = "length",
) -> RequestMetrics:
    """The metrics of a request that lived so; in seconds."""
    request = Request(
        "a", 2, SamplingParams(), [1, 2, *range(len(times))], arrival=arrival, scheduled=scheduled
    )
    request.token_times = list(times)
    request.finish(FinishReason(reason))
    return request.close(None, finished).metrics


def engine_metrics(*records: RequestMetrics) -> EngineMetrics:
    metrics = EngineMetrics()
    for made in records:
        metrics.add(made)
    return metrics


def step_result(
    tokens: tuple[int | None, ...] = (1,),
    passes: int = 1,
    computed: int = 1,
    padded: int = 0,
    model_s: float = 0.5,
    kv_bytes: int = 0,
) -> StepResult:
    choices = [None if token is None else Choice(token) for token in tokens]
    return StepResult(choices, passes, computed, padded, model_s, kv_bytes)


FULL: dict[str, Any] = {
    "arrival": 10.0,
    "scheduled": 10.25,
    "times": (10.75, 11.0, 11.5, 11.75),
    "finished": 12.0,
}
SINGLE: dict[str, Any] = {"arrival": 10.5, "scheduled": 10.5, "times": (11.5,), "finished": 11.5}
UNSEEN: dict[str, Any] = {
    "arrival": 11.0,
    "scheduled": None,
    "times": (),
    "finished": 13.0,
    "reason": "abort",
}
BEGUN: dict[str, Any] = {"arrival": 11.0, "scheduled": 12.0, "times": (), "finished": 12.5, "reason": "abort"}


@pytest.mark.parametrize(
    ("timeline", "wanted"),
    [
        pytest.param(
            FULL, (250.0, 750.0, 500.0, 1250.0, 2000.0, 1250.0 / 3, (250.0, 500.0, 250.0)), id="full"
        ),
        pytest.param(SINGLE, (0.0, 1000.0, 1000.0, 0.0, 1000.0, None, ()), id="single token"),
        pytest.param(UNSEEN, (None, None, None, None, 2000.0, None, ()), id="aborted before it began"),
        pytest.param(
            BEGUN, (1000.0, None, None, None, 1500.0, None, ()), id="aborted before the first token"
        ),
    ],
)
def test_latencies_of_a_request(timeline, wanted):
    made = record(**timeline)
    assert tuple(getattr(made, name) for name in LATENCIES) == wanted


def test_a_record_carries_what_the_request_counted():
    request = Request(
        "name", 3, SamplingParams(), [1, 2, 3], arrival=1.0, prompt_tokens_cached=2, preemptions=1
    )
    request.append(4, 1.5)
    request.finish(FinishReason.ERROR, error="broken")
    made = request.close(None, 2.0).metrics
    assert (made.request_id, made.finish_reason, type(made.finish_reason)) == ("name", "error", str)
    assert (made.prompt_tokens, made.output_tokens, made.prompt_tokens_cached, made.preemptions) == (
        3,
        1,
        2,
        1,
    )
    assert (made.arrival_s, made.finished_s) == (1.0, 2.0)


def test_latencies_add_up():
    made = record(**FULL)
    assert made.queue_ms is not None
    assert made.prefill_ms is not None
    assert made.decode_ms is not None
    assert made.queue_ms + made.prefill_ms == made.ttft_ms
    assert made.queue_ms + made.prefill_ms + made.decode_ms == made.latency_ms


def test_wall_runs_from_the_first_arrival_to_the_last_finish():
    metrics = engine_metrics(record(**SINGLE), record(**UNSEEN), record(**FULL))
    assert metrics.wall_s == 3.0


def test_tokens_per_s_counts_every_token_delivered():
    metrics = engine_metrics(record(**SINGLE), record(**UNSEEN), record(**FULL))
    assert metrics.tokens_per_s == 5 / 3.0


def test_no_requests_no_rates():
    metrics = EngineMetrics()
    assert (metrics.wall_s, metrics.tokens_per_s, metrics.host_pct, metrics.goodput(1e9, 1e9)) == (0, 0, 0, 0)


@pytest.mark.parametrize("times", [(), (5.0,)], ids=["no token", "a token"])
def test_a_run_that_took_no_time_has_a_rate_of_zero(times):
    """A clock may be too coarse for a request that ends as it comes."""
    metrics = engine_metrics(record(arrival=5.0, scheduled=5.0, times=times, finished=5.0))
    assert metrics.wall_s == 0.0
    assert metrics.goodput(1e9, 1e9) == 0.0
    assert metrics.tokens_per_s == 0.0
    assert metrics.flat()["tokens_per_s"] == 0.0


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "good"),
    [(1000, 417, 2), (1000, 416, 1), (999, 417, 1), (750, 417, 1), (749, 1e9, 0), (1e9, 0, 1), (0, 0, 0)],
)
def test_goodput_counts_requests_within_both_limits(ttft_ms, tpot_ms, good):
    """FULL: 750 and 416.7 ms; SINGLE: 1,000 ms and, with one token, no TPOT to miss. The wall is 3 s."""
    metrics = engine_metrics(record(**FULL), record(**SINGLE), record(**UNSEEN))
    assert metrics.goodput(ttft_ms, tpot_ms) == pytest.approx(good / 3)


@pytest.mark.parametrize(("reason", "good"), [("stop", 1), ("length", 1), ("abort", 0), ("error", 0)])
def test_goodput_counts_requests_that_ended_by_themselves(reason, good):
    assert engine_metrics(record(**(FULL | {"reason": reason}))).goodput(1e9, 1e9) == good / 2.0


def test_count_step_adds_up():
    metrics = EngineMetrics()
    metrics.count_step(
        2, step_result((1, None), passes=1, computed=20, padded=4, model_s=0.5, kv_bytes=70), 1.0
    )
    metrics.count_step(2, step_result((1, 2), passes=3, computed=2, padded=0, model_s=0.25, kv_bytes=90), 0.5)
    metrics.count_step(1, step_result((0,), passes=1, computed=1, padded=1, model_s=0.25, kv_bytes=80), 0.5)
    counters = metrics.counters
    assert (counters.steps, counters.forward_passes) == (3, 5)
    assert (counters.tokens_computed, counters.padded_tokens, counters.output_tokens) == (23, 5, 4)
    assert counters.kv_bytes_peak == 90
    assert counters.batch_sizes == {2: 2, 1: 1}
    assert (metrics.model_s, metrics.step_s) == (1.0, 2.0)
    assert metrics.host_pct == 50.0


def test_a_failed_row_is_no_output_token():
    metrics = EngineMetrics()
    metrics.count_step(2, StepResult([Choice(None, error="broken"), Choice(0)], 1, 2, 0, 0.5, 0), 1.0)
    assert metrics.counters.output_tokens == 1


def test_add_counts_preemptions_and_cached_prompt_tokens():
    made = dataclasses.replace(record(**FULL), preemptions=2, prompt_tokens_cached=5)
    metrics = engine_metrics(made, made, record(**SINGLE))
    assert (metrics.counters.preemptions, metrics.counters.prompt_tokens_cached) == (4, 10)
    assert list(metrics.records) == [made, made, record(**SINGLE)]


def test_unused_memory_is_a_mean_over_requests_and_steps():
    metrics = EngineMetrics()
    assert metrics.counters.kv_unused_mean == 0.0
    for requests, unused in ((1, 12), (3, 8)):
        metrics.count_step(requests, StepResult([], 1, requests, 0, 0.0, 0), 0.0, unused)
    assert metrics.counters.kv_unused_mean == 5.0
    assert metrics.flat()["kv_unused_mean"] == 5.0


@pytest.mark.parametrize(
    ("computed", "padded", "ratio"), [(0, 0, 0.0), (7, 0, 0.0), (3, 1, 0.25), (1, 3, 0.75)]
)
def test_padding_ratio_is_a_share_of_all_positions(computed, padded, ratio):
    assert Counters(tokens_computed=computed, padded_tokens=padded).padding_ratio == ratio


def test_batch_size_mean_is_the_mean_of_the_histogram():
    """A request in a step counts, whether or not the step gave it a token (a part of a prompt, a failure)."""
    metrics = EngineMetrics()
    metrics.count_step(4, step_result((None, None, 1, None)), 1.0)
    metrics.count_step(2, step_result((1, 1)), 1.0)
    assert metrics.counters.batch_sizes == {4: 1, 2: 1}
    assert metrics.flat()["batch_size_mean"] == 3.0


def test_a_summary_takes_no_longer_the_more_steps_there_were():
    """It once looked at every step that there had been: after days, each look took longer than the last."""
    metrics = EngineMetrics()
    metrics.count_step(4, step_result(), 1.0, unused=8)
    metrics.counters.batch_sizes[4] = metrics.counters.steps = 10**15
    metrics.counters.kv_unused_tokens = 8 * 10**15
    assert (metrics.flat()["batch_size_mean"], metrics.flat()["kv_unused_mean"]) == (4.0, 2.0)


def test_totals_are_of_all_requests_and_percentiles_of_the_last():
    slow, quick = record(**FULL), record(**SINGLE)
    metrics, every = EngineMetrics(window=3), EngineMetrics()
    for made in [slow] * 4 + [quick] * 3:
        metrics.add(made)
        every.add(made)
    assert list(metrics.records) == [quick] * 3
    assert (metrics.requests, metrics.tokens_delivered) == (7, 4 * 4 + 3)
    assert (metrics.wall_s, metrics.tokens_per_s) == (every.wall_s, every.tokens_per_s) == (2.0, 9.5)
    assert metrics.counters == every.counters
    flat = metrics.flat()
    assert (flat["requests"], flat["ttft_p50_ms"]) == (7, 1000.0)
    assert metrics.summary()["ttft_ms"]["count"] == 3
    assert (metrics.goodput(2000, 2000), every.goodput(800, 2000)) == (3.0, 2.0)


def test_a_hundred_thousand_requests_take_no_more_memory_than_the_window():
    tracemalloc.start()
    try:
        metrics, held, one = EngineMetrics(window=1000), [], record(**FULL)
        for number in range(100_000):
            metrics.add(dataclasses.replace(one, itl_ms=(250.0 + number, 500.0)))
            if number % 30_000 == 2_000:
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(held) == 4
    assert max(held) - min(held) < 100_000, "bytes; a record takes some hundred"
    assert metrics.requests == 100_000


def test_engines_share_no_metrics():
    one, other = EngineMetrics(), EngineMetrics()
    one.count_step(1, step_result(), 1.0)
    assert other.counters == Counters()
    assert len(other.counters.batch_sizes) == 0
