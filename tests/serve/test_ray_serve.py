"""`python -m engine serve --ray`: two replicas on this machine answer as one engine, and nothing is left.

One server is asked by most tests, in their order; what ends it is last.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import Engine, EngineConfig, SamplingParams
from perf.servers.launch import free_port
from tests.serve.running import COMPLETIONS, Client

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'dynamic-batch[ray]'")
pytestmark = pytest.mark.slow

MODEL, NAME, KEY = "random:tiny-qwen2", "tiny", "a-key"
WAIT_S = 180.0
ASKED = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
PROMPTS = [[5 + n, 9, 20 + n] for n in range(24)]
TOKENS, LONG = 40, 3000
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # or Ray keeps one in the home folder


@dataclass
class Served:
    """A server, what it printed so far, and its client."""

    process: subprocess.Popen
    lines: list[str]
    client: Client

    @property
    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if title(child).startswith("ray::ServeReplica")]

    def series(self, name: str, **labels: str) -> dict[str, float]:
        """A metric's value by replica."""
        page = self.client.get("/metrics").body.decode()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        found = [
            one for one in samples if one.name == f"vllm:{name}" and one.labels.items() >= labels.items()
        ]
        return {one.labels["replica"]: one.value for one in found}


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds; fail if it takes too long."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextmanager
def started(*options: str, key: str | None = None, address: str = "") -> Iterator[Served]:
    """A server that is ready, or has ended by itself."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "engine",
        "serve",
        "--ray",
        "--port",
        str(port),
        "--device",
        "cpu",
        *options,
    ]
    env = os.environ | AUTH | {"RAY_ADDRESS": address} | ({"ENGINE_API_KEY": key} if key else {})
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    headers = {"Authorization": f"Bearer {key}"} if key else None
    served = Served(process, [], Client(port, headers=headers))
    reading = threading.Thread(target=lambda: served.lines.extend(process.stderr), daemon=True)
    reading.start()
    try:
        until(lambda: process.poll() is not None or any("serving" in line for line in served.lines))
        yield served
    finally:
        process.kill()
        process.wait()
        reading.join()
        process.stderr.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with started("--model", MODEL, "--served-model-name", NAME, "--replicas", "2", key=KEY) as one:
        assert one.process.poll() is None, one.lines
        assert f"serving {NAME} at http://127.0.0.1:{one.client.port}/v1\n" in one.lines
        yield one


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens of every prompt, by an engine in this process."""
    engine = Engine.from_pretrained(MODEL, EngineConfig(device="cpu"), progress=False)
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [list(output.token_ids) for output in engine.generate(PROMPTS, params, progress=False)]


def whole(client: Client, prompt: list[int]) -> list[int]:
    reply = client.post(COMPLETIONS, ASKED | {"prompt": prompt, "max_tokens": TOKENS})
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["token_ids"]


def streamed(client: Client, prompt: list[int]) -> list[int]:
    reply = client.post(COMPLETIONS, ASKED | {"prompt": prompt, "max_tokens": TOKENS, "stream": True})
    assert reply.status == 200, reply.body
    *events, done = reply.events
    assert done == "[DONE]"
    assert len(events) == TOKENS
    return [token for event in events for token in event["choices"][0]["token_ids"]]


@contextmanager
def streaming(client: Client, tokens: int) -> Iterator[http.client.HTTPResponse]:
    """A stream that has begun, to be read or left."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    try:
        body = ASKED | {"prompt": [5, 6, 7], "max_tokens": tokens, "stream": True}
        connection.request("POST", COMPLETIONS, json.dumps(body), dict(client.headers))
        yield connection.getresponse()
    finally:
        connection.close()


@pytest.mark.parametrize("ask", [whole, streamed])
def test_answers_are_those_of_an_engine_in_process(served, expected, ask):
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        assert list(clients.map(lambda prompt: ask(served.client, prompt), PROMPTS)) == expected


def test_both_replicas_answer(served):
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        list(clients.map(lambda prompt: whole(served.client, prompt), PROMPTS))
    tokens = served.series("generation_tokens_total", model_name=NAME)
    assert len(tokens) == 2
    assert all(count > 0 for count in tokens.values())


def test_a_stream_comes_as_its_tokens_do(served):
    with streaming(served.client, LONG) as answer:
        pieces = [answer.read1()]
        assert b"[DONE]" not in pieces[0]
        assert sum(served.series("num_requests_running").values()) == 1
        while piece := answer.read1():
            pieces.append(piece)
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    assert len(pieces) > 10


def test_health_is_open_and_everything_else_takes_the_key(served):
    stranger = Client(served.client.port)
    assert stranger.get("/health").status == 200
    assert stranger.get("/v1/models").status == 401
    reply = served.client.get("/v1/models", **{"x-request-id": "mine"})
    assert [model["id"] for model in reply.json["data"]] == [NAME]
    assert reply.headers["x-request-id"] == "mine"
    assert (
        served.client.post(COMPLETIONS, {"prompt": [5], "max_tokens": -1}).json["error"]["param"]
        == "max_tokens"
    )


def test_a_client_that_leaves_takes_its_request_with_it(served):
    with streaming(served.client, LONG) as answer:
        answer.read1()
    until(lambda: sum(served.series("request_success_total", finished_reason="abort").values()) == 1)
    assert sum(served.series("num_requests_running").values()) == 0


def test_a_replica_that_is_killed_is_begun_again(served, expected):
    first, other = served.replicas
    first.kill()
    until(lambda: len(served.replicas) == 2 and first.pid not in [one.pid for one in served.replicas])
    until(lambda: len(served.series("num_requests_running")) == 2)
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        assert list(clients.map(lambda prompt: whole(served.client, prompt), PROMPTS)) == expected
    assert other.is_running()


def test_on_sigterm_what_is_on_its_way_ends_and_nothing_is_left(served):
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert {"raylet"} <= {child.name() for child in children}
    replies = []
    asked = ASKED | {"prompt": [5, 6, 7], "max_tokens": LONG}
    request = threading.Thread(target=lambda: replies.append(served.client.post(COMPLETIONS, asked)))
    request.start()
    until(lambda: sum(served.series("num_requests_running").values()) == 1)
    os.killpg(served.process.pid, signal.SIGTERM)  # all of them at once, as process managers do
    until(lambda: served.client.get("/health").status == 404)
    request.join()
    assert len(replies[0].json["choices"][0]["token_ids"]) == LONG
    assert served.process.wait(WAIT_S) == 0
    with pytest.raises(OSError, match="refused"):
        served.client.get("/health")
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_an_address_is_honoured_and_that_cluster_stays(expected):
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [*ray, "--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    cluster = subprocess.Popen(command, env=os.environ | AUTH, start_new_session=True, **quiet)
    try:
        listening = psutil.Process(cluster.pid)
        until(lambda: "raylet" in {child.name() for child in listening.children(recursive=True)})
        for _ in range(2):  # the second finds the port that it asks for: nothing of the first is in its way
            with started("--model", MODEL, address=f"127.0.0.1:{port}") as served:
                assert served.process.poll() is None, served.lines
                assert whole(served.client, PROMPTS[0]) == expected[0]
                served.process.send_signal(signal.SIGINT)
                assert served.process.wait(WAIT_S) == 0
            assert cluster.poll() is None
            assert "raylet" in {child.name() for child in listening.children(recursive=True)}
    finally:
        cluster.terminate()
        cluster.wait(60)


@pytest.mark.parametrize(("options", "address", "says"), [
    (("--model", "random:nothing"), "", "no replica could be started: "),
    (("--gpus", "1e6"), "", "each with gpus=1e+06, do not fit: this machine has "),
    (("--host", "0.0.0.0"), "", "needs a key"),
    ((), "127.0.0.1:1", "$RAY_ADDRESS='127.0.0.1:1' leads to no cluster"),
])  # fmt: skip
def test_what_cannot_be_served_is_one_line_and_code_2(options, address, says):
    with started(*options, address=address) as served:
        assert served.process.wait(WAIT_S) == 2
    assert served.lines[-1].startswith("error: ")
    assert says in served.lines[-1]
