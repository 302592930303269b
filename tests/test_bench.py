"""The comparison itself: what runs, which round is shown, against what, and that all are given equal work."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from engine import EngineConfig, FinishReason, InputError, SamplingParams, WorkItem
from engine.bench import report
from engine.bench.compare import Run, compare, environment
from engine.bench.options import combinations
from engine.bench.report import requests_frame, summarise
from engine.bench.workload import Workload
from engine.config import POLICIES
from engine.metrics import Counters, EngineMetrics, RequestMetrics
from engine.output import fitting, total_width
from engine.progress import Progress
from engine.request import Request
from engine.step import NON_FINITE

BOTH = [("generate", 1), ("sequential", 1)]


def made_up(
    policy: str, size: int, seconds: float, tokens: tuple[tuple[int, ...], ...] = ((5, 6), (7, 8))
) -> Run:
    """A run of a request for each of `tokens`, all ending after `seconds`."""
    metrics, outputs = EngineMetrics(), []
    for index, ids in enumerate(tokens):
        request = Request(f"request-{index}", 1, SamplingParams(max_new_tokens=len(ids)), [3], arrival=10.0)
        request.scheduled = 10.0
        for token in ids:
            request.append(token, 10.0 + seconds)
        outputs.append(request.close(None, 10.0 + seconds))
        metrics.add(outputs[-1].metrics)
    return Run(policy, size, outputs, metrics)


def work(prompts: list[list[int]], params: SamplingParams, gap: float = 0.0) -> Workload:
    items = tuple(WorkItem(prompt, params, index * gap) for index, prompt in enumerate(prompts))
    return Workload("made-up", 0, "all", items)


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(10, 256, size).tolist() for size in rng.integers(1, 30, count)]


# What runs


def test_sequential_runs_once_generate_at_every_size_and_the_others_above_1():
    assert combinations(["sequential", "dynamic"], [1, 4, 16]) == [
        ("sequential", 1),
        ("dynamic", 4),
        ("dynamic", 16),
    ]
    assert combinations(["dynamic", "generate"], [8]) == [("dynamic", 8), ("generate", 8)]
    assert combinations(["sequential"], []) == [("sequential", 1)]
    assert combinations(["generate", "sequential", "generate"], [1, 4, 4]) == [
        ("generate", 1),
        ("generate", 4),
        ("sequential", 1),
    ]
    assert {policy for policy, _ in combinations(("generate", *POLICIES), [2])} == {"generate", *POLICIES}


@pytest.mark.parametrize(("policies", "sizes", "message"), [
    (["nope"], [4], f"policies has 'nope': choose from generate, {', '.join(POLICIES)}"),
    (["dynamic"], [4, 0], "batch-sizes=0 must be a whole number of at least 1"),
    (["sequential"], [-1], "batch-sizes=-1 must be"),
    (["dynamic"], [1], "nothing to run"), (["dynamic"], [], "nothing to run"), ([], [4], "nothing to run"),
])  # fmt: skip
def test_combinations_that_are_none(policies, sizes, message):
    with pytest.raises(InputError, match=message):
        combinations(policies, sizes)


# What is shown


@pytest.mark.parametrize(("seconds", "shown"), [([2.0], 2.0), ([1.0, 3.0], 3.0), ([5.0, 1.0, 2.0], 2.0),
                                                ([4.0, 1.0, 3.0, 2.0], 3.0), ([1.0] * 4, 1.0)])  # fmt: skip
def test_the_round_shown_is_the_median_and_of_two_the_slower(seconds, shown):
    summary = summarise([made_up("dynamic", 4, s) for s in seconds])
    assert summary.rounds.tolist() == [len(seconds)]
    assert summary.tokens_per_s.tolist() == pytest.approx([4 / shown])
    assert summary.latency_p50_ms.tolist() == pytest.approx([shown * 1e3])  # all of a row is of one round


def test_speedup_and_tokens_are_against_sequential_wherever_it_stands():
    other, shorter = ((5, 6), (7, 9)), ((5, 6), (7,))
    runs = [
        made_up("dynamic", 4, 1.0, other),
        made_up("sequential", 1, 4.0),
        made_up("dynamic", 8, 0.5, shorter),
    ]
    summary = summarise(runs)
    assert list(zip(summary.policy, summary.batch_size, strict=True)) == [
        ("dynamic", 4),
        ("sequential", 1),
        ("dynamic", 8),
    ]
    assert summary.speedup.tolist() == pytest.approx([4.0, 1.0, 6.0])
    assert summary.same_tokens.tolist() == [1, 2, 1]


def test_without_sequential_the_first_run_is_the_base():
    summary = summarise([made_up("dynamic", 4, 2.0), made_up("dynamic", 8, 1.0)])
    assert summary.speedup.tolist() == pytest.approx([1.0, 2.0])


def test_every_column_of_the_table_is_in_the_summary_and_what_was_not_measured_is_a_dash():
    summary = summarise([made_up("sequential", 1, 1.0, ((5,), (7,)))])
    assert {name for _, name, _, _ in report.COLUMNS} <= set(summary.columns)
    cells = {column.name: column.cells for column in report.columns(summary)}
    assert len(cells) == len(report.COLUMNS) == 16
    shown = [cells[name] for name in ("policy", "speed-up", "TPOT P50", "same tokens")]
    assert shown == [["sequential"], ["1.00x"], ["-"], ["2/2"]]
    assert report.caption(summary).startswith("2 requests a row. speed-up: tok/s over that of sequential.")
    assert "over that of the first row." in report.caption(summarise([made_up("dynamic", 4, 1.0)]))


@pytest.mark.parametrize(("dtype", "tokens", "said"), [
    ("bfloat16", ((5,), (8,)), True),
    ("bfloat16", ((5,), (7,)), False),  # the same
    ("float32", ((5,), (8,)), False),
])  # fmt: skip
def test_why_tokens_of_16_bits_may_be_others_is_said_where_they_are(dtype, tokens, said):
    summary = summarise([made_up("sequential", 1, 1.0, ((5,), (7,))), made_up("dynamic", 4, 1.0, tokens)])
    known = {"weight_bytes": 0, "peak_rss_bytes": 0, "peak_cuda_bytes": 0, "model": "smollm2", "dtype": dtype}
    assert any("tie within rounding" in line for line in report.notes(summary, known)) == said


def test_the_times_of_a_metric_have_one_unit_that_suits_them():
    summary = summarise([made_up("sequential", 1, 20.0), made_up("dynamic", 4, 0.25)])
    columns = {column.head: column.cells for column in report.columns(summary)}
    assert columns["TTFT\nP50 s"] == columns["latency\nP95 s"] == ["20.00", "0.25"]
    assert columns["decode\nmean ms"] == ["0", "0"]


@pytest.mark.parametrize(("times", "shown"), [
    ([999.4], ("ms", 1.0, 0)), ([999.4, 3.21], ("ms", 1.0, 1)), ([0.04, 88.0], ("ms", 1.0, 2)),
    ([0.004], ("ms", 1.0, 3)), ([1000.0], ("s", 1e3, 1)), ([49_800.0, 9_400.0], ("s", 1e3, 1)),
    ([49_800.0, 0.0, float("nan"), 81.0], ("s", 1e3, 2)), ([49_800.0, 8.0], ("s", 1e3, 3)),
    ([0.0], ("ms", 1.0, 0)), ([], ("ms", 1.0, 0)),
])  # fmt: skip
def test_the_unit_and_the_decimals_of_times(times, shown):
    assert report.unit_of(times) == shown


def test_requests_frame_has_a_row_a_request_a_run():
    runs = [made_up("sequential", 1, 1.0), made_up("dynamic", 4, 2.0), made_up("sequential", 1, 3.0)]
    frame = requests_frame(runs)
    assert frame.columns[:4].tolist() == ["policy", "batch_size", "run", "request_id"]
    assert set(frame.columns[3:]) == set(RequestMetrics.__dataclass_fields__)
    assert frame.run.tolist() == [0, 0, 1, 1, 2, 2]
    assert frame.policy.tolist() == ["sequential"] * 2 + ["dynamic"] * 2 + ["sequential"] * 2
    assert frame.latency_ms.tolist() == pytest.approx([1e3, 1e3, 2e3, 2e3, 3e3, 3e3])


def test_the_table_of_a_run_fits_and_its_most_telling_columns_go_last():
    summary = summarise([made_up("sequential", 1, 50.0), made_up("continuous", 16, 1.0)])
    columns = report.columns(summary)
    kept = {width: [column.name for column in fitting(columns, width)] for width in range(20, 150)}
    assert all(total_width(fitting(columns, width)) <= width for width in kept if width >= 25)
    assert kept[149] == [column.name for column in columns]
    assert {"policy", "batch", "tok/s", "speed-up", "TTFT P50", "TTFT P95", "same tokens"} <= set(kept[66])
    assert {"TPOT P50", "TPOT P95", "latency P50", "latency P95"} <= set(kept[100])
    for narrow, wide in pairwise(kept.values()):
        assert [name for name in wide if name in narrow] == narrow


# Runs


def test_generate_and_every_policy_give_the_same_tokens_for_the_same_work(tiny):
    loaded = tiny("tiny-llama", "float64").loaded
    workload = work(prompts_of(7), SamplingParams(max_new_tokens=9, ignore_eos=True))
    pairs = combinations(("generate", *POLICIES), [3])
    runs = list(compare(loaded, workload, pairs, EngineConfig(), rounds=2))
    assert [(run.policy, run.batch_size) for run in runs] == pairs * 2
    for run in runs:
        assert [output.prompt_token_ids for output in run.outputs] == [
            tuple(item.prompt) for item in workload.items
        ]
        assert [output.token_ids for output in run.outputs] == [
            output.token_ids for output in runs[0].outputs
        ]
        assert {output.finish_reason for output in run.outputs} == {FinishReason.LENGTH}
        assert run.metrics.counters.output_tokens == 7 * 9
        assert len(run.metrics.records) == 7
    assert summarise(runs).same_tokens.tolist() == [7] * len(pairs)


def test_progress_tells_what_runs_and_counts_every_token(tiny, monkeypatch):
    monkeypatch.setattr("engine.progress.LINE_EVERY_S", 0.0)
    workload = work(prompts_of(3), SamplingParams(max_new_tokens=4, ignore_eos=True))
    log = io.StringIO()
    with Progress("bench", stream=log) as progress:
        pairs = [("generate", 2), ("continuous", 2)]
        list(compare(tiny().loaded, workload, pairs, EngineConfig(), progress=progress))
    lines = [line.rpartition(",")[0] for line in log.getvalue().splitlines()]
    assert "run 2 of 2, continuous at batch size 2: preparing" in lines
    for run in ("run 1 of 2, generate at batch size 2", "run 2 of 2, continuous at batch size 2"):
        counted = [
            line.removeprefix(f"{run}: ") for line in lines if line.startswith(f"{run}: ") and "/" in line
        ]
        assert counted[0] == "0/12 tokens"
        assert counted[-1] == "12/12 tokens"
        assert len(set(counted)) > 4


def test_generate_counts_what_sequential_counts(tiny):
    loaded = tiny("tiny-llama", "float64").loaded
    workload = work(prompts_of(5), SamplingParams(max_new_tokens=6, ignore_eos=True))
    counted = [run.metrics.counters for run in compare(loaded, workload, BOTH, EngineConfig())]
    for name in (name for name in Counters.__dataclass_fields__ if not name.startswith("kv_")):
        assert getattr(counted[0], name) == getattr(counted[1], name), name


@pytest.fixture
def llama(tiny):
    """tiny-llama with a generation config of this test's own."""
    loaded = tiny("tiny-llama", "float64").loaded
    before, loaded.model.generation_config = (
        loaded.model.generation_config,
        copy.deepcopy(loaded.model.generation_config),
    )
    yield loaded
    loaded.model.generation_config = before


@pytest.mark.parametrize("ignore", [False, True])
def test_eos_ends_both_where_it_is_honoured_and_neither_where_not(llama, ignore):
    prompts, free = prompts_of(4), SamplingParams(max_new_tokens=12, ignore_eos=True)
    whole = [
        output.token_ids for output in next(compare(llama, work(prompts, free), BOTH, EngineConfig())).outputs
    ]
    eos = [whole[0][4], whole[1][0]]
    llama.model.generation_config.eos_token_id = eos
    ends = [next((i + 1 for i, token in enumerate(ids) if token in eos), 12) for ids in whole]
    assert min(ends) == 1
    assert 1 < ends[0] <= 5
    expected = whole if ignore else [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    for run in compare(llama, work(prompts, replace(free, ignore_eos=ignore)), BOTH, EngineConfig()):
        assert [output.token_ids for output in run.outputs] == expected
        for output in run.outputs:
            stopped = not ignore and output.token_ids[-1] in eos
            assert output.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert output.stop_reason == (output.token_ids[-1] if stopped else None)


def test_the_models_own_sampling_settings_change_neither(llama):
    workload = work(prompts_of(3), SamplingParams(max_new_tokens=16, ignore_eos=True))
    plain = [output.token_ids for output in next(compare(llama, workload, BOTH, EngineConfig())).outputs]
    llama.model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, top_k=2)
    for run in compare(llama, workload, BOTH, EngineConfig()):
        assert [output.token_ids for output in run.outputs] == plain, run.policy


@pytest.mark.parametrize(("policy", "size"), [("generate", 1), ("sequential", 1), ("dynamic", 2)])
def test_requests_start_when_they_are_due_and_times_are_in_order(tiny, policy, size):
    workload = work(prompts_of(3), SamplingParams(max_new_tokens=2, ignore_eos=True), gap=0.1)
    (run,) = compare(tiny("tiny-llama").loaded, workload, [(policy, size)], EngineConfig())
    arrivals = [output.metrics.arrival_s for output in run.outputs]
    assert np.diff(arrivals) == pytest.approx([0.1, 0.1])
    for metrics in (output.metrics for output in run.outputs):
        assert 0 <= metrics.queue_ms <= metrics.ttft_ms <= metrics.latency_ms
        assert metrics.prefill_ms > 0
        assert metrics.decode_ms > 0
    assert run.metrics.wall_s >= 0.2


def test_a_run_that_was_interrupted_is_no_run_and_ends_the_rest(tiny, monkeypatch):
    from engine.engine import Engine

    step, steps = Engine.step, iter(range(10**6))

    def interrupted(engine):
        if next(steps) == 30:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    workload = work(prompts_of(4), SamplingParams(max_new_tokens=10, ignore_eos=True))
    runs = compare(
        tiny().loaded, workload, combinations(["dynamic", "sequential", "dynamic"], [4, 2]), EngineConfig()
    )
    assert next(runs).policy == "dynamic"
    with pytest.raises(KeyboardInterrupt):
        list(runs)
    runs = compare(tiny().loaded, workload, combinations(["dynamic"], [4]), EngineConfig())
    assert [output.finish_reason for output in next(runs).outputs] == [FinishReason.LENGTH] * 4


def test_a_run_with_a_request_that_failed_is_no_run(tiny, monkeypatch):
    monkeypatch.setattr("engine.runner.padded.sample", lambda logits, requests: [NON_FINITE] * len(requests))
    with pytest.raises(InputError, match="dynamic at batch size 2: request-0 failed: "):
        next(compare(tiny().loaded, work(prompts_of(2), SamplingParams()), [("dynamic", 2)], EngineConfig()))


def test_the_environment_is_plain_and_says_what_ran(tiny):
    found = environment(tiny("tiny-llama").loaded)
    assert (found["model"], found["revision"], found["dtype"]) == (
        "random:tiny-llama",
        "random-seed-0",
        "float32",
    )
    assert {type(value) for value in found.values()} <= {str, int}
    assert 0 < found["weight_bytes"] < found["peak_rss_bytes"]
