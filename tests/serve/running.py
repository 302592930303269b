"""A server in this process, on a port of its own, and a plain client for it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from engine import Engine
from engine.serve.app import Limits, Server
from engine.serve.guard import LOCAL, Guard

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What a stream told; [DONE] as text."""
        *parts, rest = self.body.split(b"\n\n")
        assert rest == b""
        assert all(part.startswith(b"data: ") and b"\n" not in part and b"\r" not in part for part in parts)
        told = [part.removeprefix(b"data: ") for part in parts]
        return ["[DONE]" if part == b"[DONE]" else json.loads(part) for part in told]


@dataclass(frozen=True)
class Client:
    """Asks a server."""

    port: int
    server: Server | None = None
    headers: Mapping[str, str] | None = None

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send a request, its body as JSON unless it is bytes, and read all of the reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            told = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, told, {**(self.headers or {}), **(headers or {})})
            reply = connection.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any) -> Reply:
        return self.ask("POST", path, body)


@contextmanager
def serving(
    engine: Engine | None,
    *,
    name: str = "tiny",
    max_requests: int = 64,
    timeout_s: float = 60.0,
    key: str | None = None,
    hosts: Sequence[str] | None = LOCAL,
) -> Iterator[Client]:
    """Serve an engine; None: one that is never loaded."""
    server = Server(name, Limits(max_requests, timeout_s))
    if engine is not None:
        server.start(engine)
    config = uvicorn.Config(
        Guard(server.app, key, hosts), port=0, lifespan="off", log_config=None, access_log=False
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield Client(running.servers[0].sockets[0].getsockname()[1], server)
    finally:
        running.should_exit = True
        thread.join()
        server.close()
