"""Hub ids, on a hub that is a server here: each way of failing is one line, after a single request."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

from engine.models import ModelError, load
from engine.models.hub import fetch

COMMIT = "c0ffee" * 6 + "beef"
SPEC = "some/model"


class Hub(ThreadingHTTPServer):
    """Serves a folder as the only commit of `some/model`, or answers everything with `status`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked, self.paths, self.most = folder, 0, list[str](), 10**9
        self.status, self.headers = 0, dict[str, str]()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that left."""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self.server.paths.append(self.path)
        if self.server.asked > self.server.most:
            self.server.status = 503
        if self.server.status < 0:
            return self.connection.shutdown(socket.SHUT_RDWR)
        if self.server.status:
            return self.say(self.server.status, self.server.headers)
        if self.path.startswith("/api/"):
            return self.tell()
        file = self.server.folder / self.path.rpartition("/")[2]
        if not file.is_file():
            return self.say(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        body = file.read_bytes()
        self.say(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"', "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def tell(self) -> None:
        """Answer what the API is asked: about the model, or which files it has."""
        names = [] if "additional_chat_templates" in self.path else sorted(self.server.folder.iterdir())
        listed = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in names
        ]
        about = {"id": SPEC, "sha": COMMIT, "tags": [], "siblings": []}
        body = json.dumps(listed if "/tree/" in self.path else about).encode()
        self.say(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a tiny model, and an empty cache; whoever waits before he asks again is caught."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s")

    load("random:tiny-llama", seed=3).model.save_pretrained(tmp_path / "hub")
    with Hub(tmp_path / "hub") as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", wait)
        yield server
        server.shutdown()


def to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask this hub from now on."""
    close_session()
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made when it is needed
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)


def error_of(spec: str) -> str:
    """What loading says, in one line without the errors that led to it."""
    with pytest.raises(ModelError) as caught:
        load(spec)
    said = str(caught.value)
    assert (caught.value.__cause__, caught.value.__suppress_context__) == (None, True)
    assert repr(spec) in said
    assert "other ways: a folder, a .gguf file, 'smollm2'" in said
    assert "\n" not in said
    return said


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


Fault = Callable[[Hub, pytest.MonkeyPatch], None]


def answering(status: int, **headers: str) -> Fault:
    def set_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.status, hub.headers = status, {name.replace("_", "-"): text for name, text in headers.items()}

    return set_up


def silent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take connections, and never answer."""
    mute = socket.create_server(("127.0.0.1", 0))
    to(f"http://127.0.0.1:{mute.getsockname()[1]}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    monkeypatch.setattr(hub, "mute", mute, raising=False)  # or it would be closed now


UNREACHABLE: dict[str, tuple[Fault, str]] = {
    "refused": (lambda hub, patch: to(f"http://127.0.0.1:{closed_port()}", patch), "refused"),
    "no such host": (lambda hub, patch: to("http://hub.invalid", patch), "did not give it"),
    "no address": (lambda hub, patch: to("nowhere", patch), "nowhere did not give it"),
    "not TLS": (lambda hub, patch: to(constants.ENDPOINT.replace("http:", "https:"), patch), "SSL"),
    "silent": (silent, "timed out"),
    "hangs up": (answering(-1), "did not give it"),
    "error": (answering(500), "500"),
    "overloaded": (answering(503), "503"),
    "rate limit": (answering(429, Retry_After="60"), "429"),
    "proxy wants a login": (answering(407), "407"),
    "token refused": (answering(401, X_Error_Message="Invalid credentials in Authorization header"), "401"),
    "another site": (answering(200), "it answers, but not as a hub does: see HF_ENDPOINT"),
    "offline": (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
    "gated": (answering(403, X_Error_Code="GatedRepo"), "ask for access at http"),
}
ABSENT: dict[str, tuple[Fault, str]] = {
    "unknown": (
        answering(404, X_Error_Code="RepoNotFound"),
        "it is not on http.*, or private: mend the name",
    ),
    "private": (answering(401, X_Error_Code="RepoNotFound"), "it is not on http.*, or private: .*log in"),
    "no config.json": (lambda hub, _: (hub.folder / "config.json").unlink(), r"has no config\.json on http"),
}


@pytest.mark.parametrize(("fault", "said"), [*UNREACHABLE.values(), *ABSENT.values()],
                         ids=[*UNREACHABLE, *ABSENT])  # fmt: skip
def test_a_hub_that_gives_no_model_is_one_line_after_one_request(hub, monkeypatch, fault, said) -> None:
    fault(hub, monkeypatch)
    with pytest.raises(ModelError, match=said):
        load(SPEC)
    asked = hub.asked
    error_of(SPEC)
    assert (asked, hub.asked) in ((0, 0), (1, 2))


@pytest.mark.parametrize("fault", [fault for fault, _ in UNREACHABLE.values()], ids=UNREACHABLE)
def test_what_is_in_the_cache_needs_no_hub(hub, monkeypatch, fault) -> None:
    first = load(SPEC)
    fault(hub, monkeypatch)
    hub.asked = 0
    again = load(SPEC)
    assert hub.asked <= 1
    assert (first.revision, again.revision) == (COMMIT, COMMIT)
    assert first.tokenizer is again.tokenizer is None
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(again.model(tokens).logits, first.model(tokens).logits)
    assert torch.equal(again.model(tokens).logits, load(str(hub.folder)).model(tokens).logits)


@pytest.mark.parametrize("spec", ["a/b--c", "a/.b", "a b/c", "a/" + "x" * 100])
def test_what_no_hub_id_looks_like_is_never_asked_for(hub, spec: str) -> None:
    assert "is no hub id" in error_of(spec)
    assert hub.asked == 0


@pytest.mark.parametrize("answers", [1, 2, 3, 4, 5, 6])
def test_a_hub_that_fails_in_the_middle_is_asked_again_for_one_file_alone(hub, monkeypatch, answers) -> None:
    """And no model comes of the files that there are so far."""
    (hub.folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.most = answers
    assert "did not load" in error_of(SPEC)
    assert len(set(hub.paths[answers:])) == 1
    assert len(hub.paths) < answers + 10


def test_files_are_fetched_but_those_of_other_kinds(hub) -> None:
    for name in ("README.md", "model.gguf", "pytorch_model.bin", "merges.txt", "spiece.model", "notes.json"):
        (hub.folder / name).write_text("{}")
    where, weights = fetch(SPEC)
    assert (where, weights) == ({"revision": COMMIT, "local_files_only": True}, {"revision": COMMIT})
    found = {path.name for path in Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/{COMMIT}/*")}
    assert found == {"config.json", "generation_config.json", "merges.txt", "spiece.model", "notes.json"}


def test_a_broken_tokenizer_is_named_by_its_hub_id(hub) -> None:
    (hub.folder / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (hub.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^some/model has a tokenizer of class NoSuchTokenizer \(.*did not"):
        load(SPEC)


def test_a_model_without_weights_is_one_line(hub) -> None:
    (hub.folder / "model.safetensors").unlink()
    assert "did not load" in error_of(SPEC)
