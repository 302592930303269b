"""What stands in front of every endpoint: whether a request may come in, its id, and a line about it."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.openai_api.api_error import ApiError
from engine.serve.responses import error_response

ACCESS = logging.getLogger("engine.serve.access")
OPEN = frozenset({"/health"})  # without a key: load balancers have none
LOCAL = ("localhost", "127.0.0.1", "[::1]")
ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Guard:
    """An application that lets in who may, gives each request an id, and logs it when it has ended.

    Args:
        app: what is guarded.
        key: that requests must have; None: none.
        hosts: names that a request may call the server by; None: any. A page that a browser on this machine
            shows can have its own name resolve to 127.0.0.1, and would otherwise be let in.
        tells_id: whether answers carry the id; not where a proxy in front adds it.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, hosts: Sequence[str] | None, tells_id: bool = True
    ) -> None:
        self._app, self._hosts, self._tells_id = app, hosts, tells_id
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if ID.fullmatch(given) else uuid.uuid4().hex.encode()
        told: dict[str, Any] = {}
        scope.setdefault("state", {})["told"] = told

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                if self._tells_id:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                told.setdefault("status", message["status"])
            await send(message)

        try:
            if (error := self._refusal(scope["path"], headers)) is None:
                await self._app(scope, receive, answer)
            else:
                await error_response(error)(scope, receive, answer)
        finally:
            told["latency_ms"] = (time.perf_counter() - began) * 1e3
            _log(request_id.decode(), scope, told)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and re.sub(r":\d*$", "", host) not in self._hosts:
            return ApiError(
                400, f"the server is not called {host[:100]!r}: call it by {', '.join(self._hosts)}"
            )
        if self._key is None or path in OPEN:
            return None
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer":
            return None
        problem = "the key is missing or wrong: send it as Authorization: Bearer KEY"
        return ApiError(401, problem, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _log(request_id: str, scope: Scope, told: dict[str, Any]) -> None:
    """Log a request: never its prompt, nor what was answered."""
    level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
    if not ACCESS.isEnabledFor(level):
        return
    status = "left" if told.get("left") else told.get("status", "broke off")
    parts = [f"{scope['method']} {scope['path'][:200]!r} {status}", f"id={request_id}"]
    parts += [f"{name}={told[name]}" for name in ("answer", "tokens_in", "tokens_out") if name in told]
    parts += [f"{name}={told[name]:.1f}" for name in ("ttft_ms", "latency_ms") if name in told]
    parts += [f"error={told['error'][:200]!r}"] if "error" in told else []
    ACCESS.log(level, " ".join(parts))
