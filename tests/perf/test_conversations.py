"""Conversations in the gate: judged after all that was said, and refused where a backend holds none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams, WorkItem, Workload
from perf.backends import Outcome, Unavailable, timeline
from perf.benchmarks.workloads import fixed
from perf.measure import machine_speed
from perf.measure.case import PerfCase
from perf.measure.machine_speed import MachineSpeed
from perf.measure.session import BenchSession
from perf.measure.token_check import WrongTokens
from perf.measure.trial import Trial
from tests.perf.test_case import Fixture, Scripted

pytestmark = pytest.mark.usefixtures("imported_for_measuring")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> BenchSession:
    monkeypatch.setattr(machine_speed, "measure", lambda *args, **how: MachineSpeed(100.0, 10.0))
    options: dict[str, Any] = {"dtype": None, "rounds": None, "quick": False, "inject_slowdown": 0.0}
    return BenchSession(model="random:tiny-llama", min_time=0.0, **options)


def conversation() -> Workload:
    items = fixed(4, 8, 4, 256).items
    follows = None, 0, 1, None
    items = tuple(replace(item, follows=before) for item, before in zip(items, follows, strict=True))
    return Workload("talk", 0, "all", items)


@pytest.mark.parametrize("caching", [False, True])
def test_answers_of_a_conversation_are_judged_after_all_that_was_said(bench: BenchSession, caching: bool):
    case = PerfCase(bench, Fixture(), None)
    how: dict[str, Any] = {"device": "cpu", "max_batch_size": 2, "rounds": 2}
    options = {"prefix_caching": caching, "page_size": 4}
    info = case.measure("talk", "continuous", conversation(), options=options, **how)
    assert (info["same_tokens"], info["checked_requests"], info["workload"]) == (4, 4, "talk")
    cached = 8 + 20 if caching else 0  # of 8 + 4 tokens and of 8 + 4 + 8 + 4, all but the last, in pages of 4
    assert info["rounds"]["prompt_tokens_cached"] == [cached, cached]
    assert len(set(info["rounds"]["forward_passes"])) == 1  # turns begin at the same steps
    trial = Trial(bench, "talk", "continuous", conversation(), device="cpu", max_batch_size=2)
    lengths = trial._lengths
    outcome = trial.session.run(trial.workload.items)
    trial.check(outcome)
    swapped = [outcome.tokens[0][::-1], *outcome.tokens[1:]]  # then the second was asked something else
    with pytest.raises(WrongTokens):
        trial.check(Outcome(swapped, outcome.metrics))
    trial.close()
    assert lengths == [(8, 4), (20, 4), (32, 4), (8, 4)]


def test_a_backend_that_holds_no_conversations_is_unavailable_by_name(bench: BenchSession):
    backend = Scripted()
    for found in (backend, "generate", "transformers-cb"):
        name = found if isinstance(found, str) else "scripted"
        with pytest.raises(
            Unavailable, match=f"^{name}: it holds no conversations, and the workload has some"
        ):
            Trial(bench, "talk", found, conversation(), device="cpu", max_batch_size=2)
    assert backend.log == []


def test_a_file_is_a_workload_with_its_own_arrivals(bench: BenchSession, tmp_path: Path):
    rows = [{"token_ids": [3, 4, at], "output_tokens": 2, "timestamp": at / 1e3} for at in range(5, 8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    case = PerfCase(bench, Fixture(), None)
    how: dict[str, Any] = {"device": "cpu", "max_batch_size": 2, "rounds": 1}
    info = case.measure("mine", "dynamic", str(tmp_path / "mine.jsonl"), **how)
    assert info["workload"].startswith("mine.jsonl@")
    assert (info["arrivals"], info["same_tokens"]) == ("trace", 3)
    assert "forward_passes" not in info["rounds"]


def test_a_follow_up_is_due_after_the_answer_before_and_has_all_of_it_in_its_prompt():
    params = SamplingParams(max_new_tokens=2)
    items = [WorkItem([1, 2, 3], params), WorkItem([4], params, 0.5, 0), WorkItem([5, 6], params, 0.0, 1)]
    seconds = [[0.1, 0.2], [1.0, 1.1], [1.3, 1.5]]
    records = timeline(items, [[7, 8]] * 3, seconds, began=100.0).metrics.records
    assert [record.prompt_tokens for record in records] == [3, 3 + 2 + 1, 6 + 2 + 2]
    assert [record.arrival_s for record in records] == pytest.approx([100.0, 100.7, 101.1])
    assert [record.ttft_ms for record in records] == pytest.approx([100.0, 300.0, 200.0])
