"""Command lines of servers that others wrote, each for the settings in which it is at its best.

`serve` becomes the server's process, so that whoever started it holds the server itself by its process id.
All listen on 127.0.0.1 and ask no hub.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.servers import environments
from perf.servers.launch import HOST
from perf.servers.models import Model, find_model, hub_cache_of, refused

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of an element
LLAMA_CPP = Path(__file__).with_name("llama_cpp.py")
PAGE = 256  # tokens of a page of Transformers' cache
STEP_TOKENS = 512  # of a step of Transformers' continuous batching: its mask is dense, of these and the cache
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # GiB
NO_TRAFFIC = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Wanted:
    """How a server is to run.

    `max_batch_size` requests at once, each with at most `context` tokens, prompt and output. No `dtype` is
    float32, and for llama.cpp its own choice. `extra` goes to the server as it is, last.
    """

    port: int
    threads: int
    dtype: str | None = None
    max_batch_size: int = 32
    context: int = 1024
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A process to become: its program first, and its environment besides the caller's.

    `settings` are as they say; `defaults` are for what the caller's environment does not set.
    """

    command: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)


def transformers_serve(model: Model, wanted: Wanted) -> Launch:
    """Return `transformers serve` with continuous batching.

    It lists what the hub's cache has rather than what it serves, so it is given a cache with this model only.
    """
    pages = wanted.max_batch_size * math.ceil(wanted.context / PAGE)
    command = (
        program("transformers-serve", "transformers"), "serve", model.name, "--continuous-batching",
        "--host", HOST, "--port", str(wanted.port), "--device", "cpu", "--dtype", wanted.dtype or "float32",
        "--attn-implementation", "sdpa", "--cb-num-blocks", str(pages),
        "--cb-max-batch-tokens", str(STEP_TOKENS), *wanted.extra,
    )  # fmt: skip
    settings = {"HF_HUB_CACHE": str(hub_cache_of(model)), "OMP_NUM_THREADS": str(wanted.threads)}
    return Launch(command, settings, {"TOKENIZERS_PARALLELISM": "false"})


def llama_cpp(model: Model, wanted: Wanted) -> Launch:
    """Return llama.cpp's own server.

    Weights are as the file has them. `dtype` is that of the KV cache; float16, llama.cpp's own choice, if not
    given.
    """
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    command = (
        program("llama-cpp", "python"), str(LLAMA_CPP), "--model", str(model.path), "--alias", model.name,
        "--port", str(wanted.port), "--threads", str(wanted.threads), "--slots", str(wanted.max_batch_size),
        "--context", str(wanted.context), "--cache-type", kinds[wanted.dtype or "float16"], *wanted.extra,
    )  # fmt: skip
    return Launch(command)


def vllm_cpu(model: Model, wanted: Wanted) -> Launch:
    """Return vLLM's server, by its module: the command `vllm` of this package does not start.

    A step is not compiled, which takes a C++ compiler and minutes at each start. Threads are not bound to
    processors, as those of the others are not.
    """
    dtype = wanted.dtype or "float32"
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    context = min(wanted.context, config.get("max_position_embeddings", wanted.context))
    command = (
        program("vllm-cpu", "python"), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model.path), "--served-model-name", model.name,
        "--host", HOST, "--port", str(wanted.port), "--dtype", dtype,
        "--max-num-seqs", str(wanted.max_batch_size), "--max-model-len", str(context),
        "--no-enable-prefix-caching", "--enforce-eager", "--disable-uvicorn-access-log", *wanted.extra,
    )  # fmt: skip
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    if KV_SPACE not in os.environ:
        tokens = wanted.max_batch_size * context
        defaults[KV_SPACE] = str(kv_gibibytes(config, tokens, DTYPES[dtype]))
    return Launch(command, {"OMP_NUM_THREADS": str(wanted.threads)}, defaults)


PEERS: dict[str, Callable[[Model, Wanted], Launch]] = {
    "transformers-serve": transformers_serve,
    "llama-cpp": llama_cpp,
    "vllm-cpu": vllm_cpu,
}


def serve(name: str, spec: str, wanted: Wanted, tell: Callable[[str], object]) -> None:
    """Become the process of a peer's server; does not return.

    Raises:
        GateError: for a peer that is none or is not set up, a dtype, a port in use, or a model that it cannot
            serve, before anything is started.
    """
    if name not in PEERS:
        raise refused(f"peer {name!r} is no server: it must be one of {', '.join(PEERS)}")
    if not environments.installed(name):
        raise refused(f"{name} is not set up: {environments.way_to_get(name)}")
    if wanted.dtype not in (None, *DTYPES):
        raise refused(f"--dtype {wanted.dtype!r} must be one of {', '.join(DTYPES)}")
    check_port(wanted.port)
    launch = PEERS[name](find_model(name, spec, tell, gguf=name == "llama-cpp"), wanted)
    tell(f"{name} at http://{HOST}:{wanted.port}: ready when GET /health answers 200")
    sys.stdout.flush()
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment = {**launch.defaults, **inherited, **NO_TRAFFIC, **launch.settings}
    os.execvpe(launch.command[0], launch.command, environment)


def check_port(port: int) -> None:
    """Raise GateError if no server can listen on that port of this machine."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
            raise refused(f"port {port} of {HOST} {why}: name another by --port") from None


def kv_gibibytes(config: dict[str, Any], tokens: int, element_bytes: int) -> int:
    """Return the GiB that the keys and values of so many tokens take, rounded up, by a config.json."""
    own = config.get("text_config", config)
    try:
        heads = own["num_attention_heads"]
        head_dim = own.get("head_dim") or own["hidden_size"] // heads
        numbers = 2 * own["num_hidden_layers"] * (own.get("num_key_value_heads") or heads) * head_dim
    except KeyError as missing:
        raise refused(f"config.json does not say {missing}: set {KV_SPACE} (GiB)") from None
    return math.ceil(tokens * numbers * element_bytes / 2**30)


def program(peer: str, name: str) -> str:
    """Return the path of a program of a peer's environment."""
    return str(environments.home(peer) / "bin" / name)
