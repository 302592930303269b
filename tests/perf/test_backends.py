"""Backends: found by name, honest about their times, and all with the same tokens."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine import InputError, LoadedModel, RequestMetrics, SamplingParams, WorkItem, load
from perf import backends
from perf.backends import BUILT_IN, Setup, find, timeline
from perf.benchmarks.workloads import fixed
from tests.oracle import Oracle


class Mine:
    """A backend of a user's."""

    name = "mine"

    def missing(self, device: str) -> str | None:
        return None

    def open(self, setup: Setup) -> Any:
        return setup


class Half:
    name = "half"


def items_of(*limits: int) -> list[WorkItem]:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(10, 256, 5 + 7 * at).tolist() for at in range(len(limits))]
    return [WorkItem(prompt, SamplingParams(max_new_tokens=n, ignore_eos=True)) for prompt, n in
            zip(prompts, limits, strict=True)]  # fmt: skip


def setup_of(loaded: LoadedModel, batch: int = 2, **options: Any) -> Setup:
    return Setup(loaded, "cpu", "float32", batch, options=options)


# What perf may know of the engine


def test_perf_imports_what_the_engine_exports_and_nothing_else_of_it():
    root = Path(backends.__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not [name.name for name in node.names if name.name.startswith("engine.")], file
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "engine":
                assert node.module == "engine", (file, node.module)
                assert {name.name for name in node.names} <= set(engine.__all__), file


def test_every_exported_name_is_there_and_none_is_taken_for_another():
    assert [name for name in engine.__all__ if not hasattr(engine, name)] == []
    assert engine.WorkItem.__name__ == "WorkItem"
    with pytest.raises(AttributeError, match="module 'engine' has no attribute 'nothing'"):
        engine.nothing  # noqa: B018
    config = load("random:tiny-llama").model.config
    assert engine.max_positions(config) == config.max_position_embeddings == 4096


# Finding


def test_backends_are_found_by_name_module_and_entry_point(monkeypatch: pytest.MonkeyPatch):
    assert [find(name).name for name in BUILT_IN] == list(BUILT_IN)
    assert find(f"{__name__}:Mine").name == "mine"

    class Point:
        name, value = "installed", f"{__name__}:Mine"

    monkeypatch.setattr(
        backends, "entry_points", lambda group: [Point] if group == "dynamic_batch.backends" else []
    )
    assert find("installed").name == "mine"
    with pytest.raises(
        InputError, match=r"backend 'nobody' is none of sequential, .*, installed, nor of the form"
    ):
        find("nobody")


@pytest.mark.parametrize(
    ("name", "said"),
    [("no_such_module:X", "cannot be imported"), (f"{__name__}:Absent", "cannot be imported"),
     (f"{__name__}:Half", "has no missing, open")],
)  # fmt: skip
def test_what_is_no_backend_is_refused_by_name(name: str, said: str):
    with pytest.raises(InputError, match=f"{name}.*{said}"):
        find(name)


# Timelines


def test_a_timeline_becomes_the_metrics_of_its_times():
    items = [WorkItem([1, 2, 3], SamplingParams(max_new_tokens=3), arrival_s=1.0)]
    outcome = timeline(items, [[7, 8, 9]], [[1.5, 1.6, 1.8]], counters={"forward_passes": 3}, began=100.0)
    flat = outcome.metrics.flat()
    assert outcome.tokens == [(7, 8, 9)]
    assert flat["ttft_p50_ms"] == pytest.approx(500.0)  # from when it was due
    assert flat["latency_p50_ms"] == pytest.approx(800.0)
    assert flat["tpot_p50_ms"] == pytest.approx(150.0)
    assert flat["tokens_per_s"] == pytest.approx(3 / 0.8)
    assert (flat["forward_passes"], flat["output_tokens"]) == (3, 3)
    (record,) = outcome.metrics.records
    assert record == RequestMetrics.from_times(
        "request-0", prompt_tokens=3, arrival_s=101.0, scheduled_s=101.0,
        token_times_s=[101.5, 101.6, 101.8], finished_s=101.8,
    )  # fmt: skip
    assert (record.finish_reason, record.queue_ms) == ("length", 0.0)


@pytest.mark.parametrize(
    ("tokens", "seconds", "said"),
    [
        ([[1]], [[0.1]], "asked for 2 tokens and got 1"),
        ([[1, 2]], [[0.1]], "with 1 times"),
        ([], [], "got 0 outputs"),
    ],
)
def test_a_timeline_that_does_not_fit_is_the_backend_s_fault(tokens: Any, seconds: Any, said: str):
    with pytest.raises(InputError, match=said):
        timeline([WorkItem([1], SamplingParams(max_new_tokens=2))], tokens, seconds)


# In this process


@pytest.mark.parametrize(
    "name", ["sequential", "dynamic", "continuous", "generate", "generate-padded", "transformers-cb"]
)
def test_every_backend_gives_the_oracle_s_tokens_run_after_run(name: str):
    loaded = load("random:tiny-llama")
    oracle, items = Oracle(loaded), items_of(3, 9, 1, 6)
    expected = [oracle.answer(item.prompt, item.params.max_new_tokens) for item in items]
    options = {"max_memory_percent": 0.1} if name == "transformers-cb" else {}
    session = find(name).open(setup_of(loaded, **options))
    for _ in range(2):
        outcome = session.run(items)
        assert outcome.tokens == expected
        flat = outcome.metrics.flat()
        assert (flat["requests"], flat["output_tokens"]) == (4, 19)
        assert 0 < flat["ttft_p50_ms"] <= flat["latency_p95_ms"]
    session.close()
    assert Oracle(loaded).answer(items[1].prompt, 9) == expected[1]  # it left the model as it was


def test_one_run_s_prompts_are_not_cached_for_the_next():
    work = fixed(4, 64, 2, 256)
    shared = [WorkItem([*work.items[0].prompt[:48], *item.prompt[48:]], item.params) for item in work.items]
    session = find("continuous").open(setup_of(load("random:tiny-llama"), 1, prefix_caching=True))
    cached = []
    for _ in range(2):
        session.reset()
        cached.append(session.run(shared).metrics.flat()["prompt_tokens_cached"])
    assert cached == [3 * 48, 3 * 48]
    plain = find("continuous").open(setup_of(load("random:tiny-llama"), 1))
    assert [plain.run(shared).metrics.flat()["prompt_tokens_cached"] for _ in range(2)] == [0, 0]


# Peers in environments of their own
