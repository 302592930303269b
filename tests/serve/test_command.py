"""`python -m engine serve` as a process: from its start to its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.cli import main
from perf.servers.launch import free_port
from tests.serve.running import COMPLETIONS, Client

ASKED = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
TINY = ("--model", "random:tiny-llama", "--device", "cpu")


@contextmanager
def started(*options: str, env=None) -> Iterator[tuple[subprocess.Popen, Client]]:
    port = free_port()
    command = [sys.executable, "-m", "engine", "serve", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        yield process, Client(port)
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen, client: Client) -> list[int]:
    """Wait, and give the statuses of /health until then."""
    seen = []
    while not seen or seen[-1] != 200:
        assert process.poll() is None, process.communicate()[1]
        try:
            seen.append(client.get("/health").status)
        except OSError:
            time.sleep(0.02)
    return seen


def ended(*options: str, env=None) -> tuple[int, str]:
    """The exit code and the last line of a server that ends by itself."""
    with started(*options, env=env) as (process, _):
        output = process.communicate(timeout=120)[1]
        return process.returncode, output.strip().splitlines()[-1]


def test_on_sigterm_what_is_on_its_way_ends_and_nothing_else_begins():
    with started(*TINY, "--served-model-name", "mine") as (process, client):
        assert 503 in wait_until_ready(process, client)  # it listens while the model is loaded
        assert client.get("/v1/models").json["data"][0]["id"] == "mine"
        replies = []
        long = ASKED | {"max_tokens": 1500}
        thread = threading.Thread(target=lambda: replies.append(client.post(COMPLETIONS, long)))
        thread.start()
        while b'num_requests_running{model_name="mine"} 1' not in client.get("/metrics").body:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert replies[0].json["usage"]["completion_tokens"] == 1500
        output = process.communicate(timeout=30)[1]
        assert process.returncode == 0
        with pytest.raises(OSError, match="refused"):
            client.get("/health")
    assert f"serving mine at http://127.0.0.1:{client.port}/v1" in output
    assert "tokens_in=3" in output


def test_what_does_not_end_in_time_is_ended():
    with started(*TINY, "--drain-timeout", "1") as (process, client):
        wait_until_ready(process, client)
        body = json.dumps(ASKED | {"max_tokens": 2000, "stream": True, "return_token_ids": True}).encode()
        with socket.create_connection(("127.0.0.1", client.port)) as peer:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            peer.sendall(head.encode() + body)
            peer.recv(100)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    assert process.returncode == 0


def test_ctrl_c_while_the_model_is_loaded_ends_it():
    with started(*TINY) as (process, client):
        while True:
            try:
                client.get("/health")
                break
            except OSError:
                time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(("options", "says"), [
    (("--model", "random:nothing"), "random:nothing"),
    (("--host", "0.0.0.0"), "needs a key"),
    (("--api-key-file", "/nothing"), "api-key-file='/nothing' cannot be read"),
    (("--api-key-file", "/dev/null"), "is empty"),
    (("--without-key", "--host", "no.such.host.invalid"), "cannot be listened at"),
    (("--replicas", "2"), "replicas=2 is for a Ray cluster: give --ray too"),
    (("--gpus", "0.5"), "gpus=0.5 is for a Ray cluster: give --ray too"),
])  # fmt: skip
def test_what_cannot_be_served_is_one_line_and_code_2(options, says):
    code, line = ended(*options)
    assert code == 2
    assert line.startswith("error: ")
    assert says in line


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, line = ended("--port", str(other.getsockname()[1]))
    assert code == 2
    assert "Address already in use" in line


def test_without_ray_the_extra_is_named(monkeypatch, capfd):
    for name in [name for name in sys.modules if name.startswith(("ray.", "engine.cluster"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as exit:
        main(["serve", *TINY, "--ray", "--replicas", "2"])
    assert exit.value.code == 2
    said = "this needs ray, which is not installed: pip install 'dynamic-batch[ray]'"
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {said}"


@pytest.mark.parametrize("options", [("--replicas", "0"), ("--gpus", "-1")])
def test_what_is_out_of_bounds_is_a_usage_error(options, capfd):
    with pytest.raises(SystemExit) as exit:
        main(["serve", *TINY, "--ray", *options])
    assert exit.value.code == 2
    assert f"Invalid value for '{options[0]}'" in capfd.readouterr().err
