"""A tiny server that speaks OpenAI's API as well, or as badly, as a test asks of it.

It runs in a thread of its own with an event loop, or as a program (`scripted_server.py PORT gap_ms=5`); every
misbehaviour that the client must meet is a switch. The answer to a prompt is a function of the prompt alone.
It imports the standard library alone, so that a copy of it is a server in any repository.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "red", "blue", "mat", "tree"]


@dataclass
class Script:
    """How the server behaves.

    refuse: fields that it answers with 400, and names; refuse_silently: without naming them. ids, usage:
    whether it tells them. usage_in: "own" chunk, or the "finish" chunk. role_first: a chunk with the role
    alone. newline: of its frames. done: whether `[DONE]` ends a stream. finish: whether a finish_reason does.
    stop_after: tokens after which a stream is broken off; error_after: after which an error is told in it.
    together: tokens in a chunk. first_ms, gap_ms: before the first token and between two. ends_at: tokens
    after which it ends by itself, whatever is asked. busy: so many requests are first answered with 429.
    loading: so many looks at /health are answered with 503. health: whether there is one. only: the API that
    it has. key: that it wants. metrics: the page of /metrics. split: bytes of a write. fail_every: requests
    after which one is answered with 500. hangs_up: whether it closes a connection after a stream, unsaid.
    dies_after: requests after which the program ends.
    """

    refuse: tuple[str, ...] = ()
    refuse_silently: tuple[str, ...] = ()
    ids: bool = True
    takes_ids: bool = True
    usage: bool = True
    usage_in: str = "own"
    role_first: bool = True
    newline: str = "\n"
    done: bool = True
    finish: bool = True
    stop_after: int | None = None
    error_after: int | None = None
    together: int = 1
    first_ms: float = 0.0
    gap_ms: float = 0.0
    ends_at: int | None = None
    busy: int = 0
    loading: int = 0
    health: bool = True
    only: str | None = None
    key: str | None = None
    metrics: str | None = None
    split: int | None = None
    fail_every: int | None = None
    hangs_up: bool = False
    dies_after: int | None = None
    answers: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """Serve at a free port of the loopback interface; gives the address."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    address: list[str] = []
    over = asyncio.Event()

    async def serve() -> None:
        server = await _listen(script, 0)
        address.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()
        await over.wait()
        server.close()
        sessions = asyncio.all_tasks() - {asyncio.current_task()}
        for task in sessions:
            task.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


async def _listen(script: Script, port: int) -> asyncio.Server:
    return await asyncio.start_server(lambda r, w: _Session(script, r, w).talk(), "127.0.0.1", port)


def main(port: str, *settings: str) -> None:
    """Serve until killed; a setting is `field=number`."""
    fields = (setting.split("=") for setting in settings)
    script = Script(**{name: float(value) if "." in value else int(value) for name, value in fields})

    async def serve() -> None:
        server = await _listen(script, int(port))
        await server.serve_forever()

    asyncio.run(serve())


def words(prompt: object, count: int) -> list[str]:
    """Return the answer to a prompt."""
    seed = zlib.crc32(json.dumps(prompt).encode())
    return [" " + WORDS[(seed >> (i % 24)) % len(WORDS)] for i in range(count)]


class _Session:
    """One connection."""

    def __init__(self, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.script, self.reader, self.writer = script, reader, writer

    async def talk(self) -> None:
        try:
            while head := await self.reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
                body = await self.reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = lines[0].split(" ")
                if not await self._answer(method, path.partition("?")[0], headers, body):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            self.writer.close()

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bool:
        script = self.script
        if path == "/health":
            script.loading -= 1
            return await self._json(503 if script.loading >= 0 else 200 if script.health else 404, {})
        if script.key and headers.get("authorization") != f"Bearer {script.key}":
            return await self._json(401, {"error": {"message": "no key"}})
        if path == "/v1/models":
            return await self._json(200, {"data": [{"id": "scripted", "object": "model"}]})
        if path == "/metrics" and script.metrics is not None:
            return await self._text(200, script.metrics.format(answers=script.answers))
        api = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}.get(path)
        if method != "POST" or api is None or script.only not in (None, api):
            return await self._json(404, {"detail": "Not Found"})
        return await self._complete(api, json.loads(body))

    async def _complete(self, api: str, asked: dict[str, Any]) -> bool:
        script = self.script
        script.seen.append(asked)
        if script.busy > 0:
            script.busy -= 1
            return await self._json(429, {"error": {"message": "queue full"}})
        for name in script.refuse:
            if name in asked:
                return await self._json(400, {"error": {"message": f"Unknown parameter: {name}"}})
        if any(name in asked for name in script.refuse_silently):
            return await self._json(422, {"detail": "Unprocessable Entity"})
        prompt = asked.get("prompt", asked.get("messages"))
        if api == "completions" and isinstance(prompt, list) and not script.takes_ids:
            return await self._json(400, {"error": {"message": "prompt must be a string"}})
        script.answers += 1
        if script.dies_after is not None and script.answers > script.dies_after:
            print("out of memory", flush=True)
            os._exit(9)
        if script.fail_every and script.answers % script.fail_every == 0:
            return await self._json(500, {"error": {"message": "out of luck"}})
        return await self._stream(api, asked, prompt)

    async def _stream(self, api: str, asked: dict[str, Any], prompt: object) -> bool:
        script = self.script
        most = asked.get("max_completion_tokens") or asked.get("max_tokens") or 16
        count = min(most, script.ends_at or most)
        self.writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if api == "chat" and script.role_first:
            await self._event(self._chunk(api, {"role": "assistant"}))
        await _exactly(script.first_ms / 1e3)
        said = words(prompt, count)
        for at in range(0, count, script.together):
            if at:
                await asyncio.sleep(script.gap_ms / 1e3)
            if script.stop_after is not None and at >= script.stop_after:
                return False
            if script.error_after is not None and at >= script.error_after:
                await self._event({"error": {"message": "the worker died", "code": 500}})
                break
            some = said[at : at + script.together]
            ids = [WORDS.index(word.strip()) for word in some] if asked.get("return_token_ids") else None
            await self._event(self._chunk(api, {"content": "".join(some)}, ids if script.ids else None))
        end = self._chunk(api, {}, finish="length" if count == most else "stop") if script.finish else None
        usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
        usage["prompt_tokens_details"] = {"cached_tokens": 3}
        wanted = script.usage and "stream_options" in asked
        if end and wanted and script.usage_in == "finish":
            end["usage"] = usage
        if end:
            await self._event(end)
        if wanted and script.usage_in == "own":
            await self._event({**self._chunk(api, {}), "choices": [], "usage": usage})
        if script.done:
            await self._event("[DONE]")
        await self._write_chunk(b"")
        return not script.hangs_up

    def _chunk(
        self, api: str, delta: dict[str, str], ids: list[int] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if api == "chat":
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        if ids is not None:
            choice["token_ids"] = ids
        kind = "chat.completion.chunk" if api == "chat" else "text_completion"
        return {"id": "x", "object": kind, "model": "scripted", "choices": [choice]}

    async def _event(self, what: object) -> None:
        data = what if isinstance(what, str) else json.dumps(what)
        frame = f": a comment{self.script.newline}data: {data}{self.script.newline * 2}".encode()
        size = self.script.split or len(frame)
        for at in range(0, len(frame), size):
            await self._write_chunk(frame[at : at + size])
            if self.script.split:
                await asyncio.sleep(0.001)

    async def _write_chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def _json(self, status: int, body: object) -> bool:
        return await self._text(status, json.dumps(body))

    async def _text(self, status: int, body: str) -> bool:
        data = body.encode()
        self.writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))
        await self.writer.drain()
        return True


async def _exactly(seconds: float) -> None:
    """Sleep, and be awake when it is over: a timer alone is a millisecond late."""
    until = time.perf_counter() + seconds
    await asyncio.sleep(max(0.0, seconds - 0.002))
    while time.perf_counter() < until:
        await asyncio.sleep(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
