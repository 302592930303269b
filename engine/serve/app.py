"""The ASGI application: OpenAI's endpoints on an engine that all requests share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import InputError
from engine.openai_api.answers import DONE, event
from engine.openai_api.api_error import ApiError
from engine.openai_api.fields import Asked, parse, refused
from engine.openai_api.served_model import ServedModel
from engine.serve.prometheus import CONTENT_TYPE, Prometheus
from engine.serve.responses import error_response, json_response

LOG = logging.getLogger(__name__)
MOST_BYTES = 4 << 20  # of a body
INLINE_BYTES = 8192  # of a body whose text is encoded in the event loop: a millisecond at most
BODY_S = 30.0  # within which it must have come
RETRY_S = "1"
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True, slots=True)
class Limits:
    """max_requests: that may be on their way, waiting ones included. timeout_s: for a whole answer."""

    max_requests: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is served: as clients know it, its engine, and what Prometheus is told."""

    model: ServedModel
    engine: AsyncEngine
    prometheus: Prometheus


class Server:
    """An engine, as soon as it is there, and what is asked of it.

    Args:
        name: of the model, as clients know it.
        limits: of all requests together, and of each.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.loaded: Loaded | None = None
        self.draining = False
        self.requests = 0  # on their way
        self.created = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # beside the event loop, not in it
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/chat/completions", Endpoint(self, chat=True), methods=["POST"]),
                Route("/v1/completions", Endpoint(self, chat=False), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _fault},
        )

    def start(self, engine: Engine, replica: str | None = None) -> None:
        """Serve from now on. With several engines, `replica` names this one in its metrics."""
        model = ServedModel(engine, self.name)
        self.loaded = Loaded(model, AsyncEngine(engine), Prometheus(engine, self.name, replica))

    def close(self) -> None:
        """End the engine after the step it is in."""
        if self.loaded is not None:
            self.loaded.engine.close()
        self._tokenizing.shutdown()

    @property
    def ended(self) -> str | None:
        """Why the engine has ended; None while it has not."""
        return None if self.loaded is None else self.loaded.engine.ended

    def ready(self) -> Loaded:
        """Return what is served. Raises ApiError while there is nothing, or nothing any more."""
        if self.loaded is not None and not self.draining and self.ended is None:
            return self.loaded
        why = "the server is ending" if self.draining else self.ended or "the model is being loaded"
        raise ApiError(503, why, headers={"Retry-After": RETRY_S})

    async def health(self, request: Request) -> Response:
        self.ready()
        return Response("ok\n", media_type="text/plain")

    async def metrics(self, request: Request) -> Response:
        return Response(self.ready().prometheus.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._about(self.ready().model)]})

    async def one_model(self, request: Request) -> Response:
        model = self.ready().model
        model.check_name(request.path_params["name"])
        return json_response(self._about(model))

    def _about(self, model: ServedModel) -> dict[str, Any]:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "dynamic-batch"}
        return about | {"root": model.engine.spec, "max_model_len": model.engine.room(1)}

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Take so many places among the requests on their way.

        Raises:
            ApiError: with status 429 while there are not so many free, 400 if there never are.
        """
        if count > self.limits.max_requests:
            most = f"at most {self.limits.max_requests} requests may be on their way"
            raise ApiError(400, f"{count} prompts: {most}: send fewer at once", "prompt")
        if self.requests + count > self.limits.max_requests:
            problem = f"{self.requests} requests are on their way, of {self.limits.max_requests} at most"
            raise ApiError(429, f"{problem}: come again later", headers={"Retry-After": RETRY_S})
        self.requests += count
        try:
            yield
        finally:
            self.requests -= count

    async def prompts(self, model: ServedModel, asked: Asked, size: int) -> list[list[int]]:
        """Return the token ids of every prompt, checked; `size` is that of the body, bytes.

        A long text is encoded beside the event loop; for a short one that would take longer than encoding it,
        since the processors are busy computing, and a thread that wakes waits for one.
        """
        if size <= INLINE_BYTES:
            return model.prompts(asked)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, model.prompts, asked)


class Endpoint:
    """An endpoint that generates."""

    def __init__(self, server: Server, chat: bool) -> None:
        self.server, self.chat = server, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. A client that leaves takes its request with it."""
        exchange = Exchange(self.server, self.chat, scope, receive, send)
        try:
            async with asyncio.timeout(self.server.limits.timeout_s):
                await exchange.run()
        except TimeoutError:
            limit = f"the answer took longer than {self.server.limits.timeout_s:g} s"
            await exchange.fail(ApiError(504, limit))
        except ApiError as error:
            await exchange.fail(error)
        except InputError as error:
            await exchange.fail(refused(error))
        except ClientDisconnect:
            scope["state"]["told"]["left"] = True
        except Exception as error:
            if self.server.ended is None:
                LOG.exception("a request failed by a fault of this program")
                await exchange.fail(_told(error))
            else:
                await exchange.fail(ApiError(503, self.server.ended))


class Exchange:
    """One request and its answer."""

    def __init__(self, server: Server, chat: bool, scope: Scope, receive: Receive, send: Send) -> None:
        self.server, self.chat, self._scope, self._receive, self._send = server, chat, scope, receive, send
        self._begun = False  # whether the status has been sent

    async def run(self) -> None:
        """Read, answer, and stop where the client leaves."""
        body = await self._body()
        arrival = time.perf_counter()
        loaded = self.server.ready()
        asked = loaded.model.read(parse(body), self.chat)
        with self.server.places(max(1, len(asked.prompts))):
            await self._until_left(self._answer(loaded, asked, len(body), arrival))

    async def fail(self, error: ApiError) -> None:
        """Tell the client what went wrong: in the stream, if that has begun."""
        self._scope["state"]["told"]["error"] = error.message
        if not self._begun:
            await self._respond(error_response(error))
        else:
            self._scope["state"]["told"]["status"] = error.status
            await self._part(event(error.body()) + DONE, more=False)

    async def _body(self) -> bytes:
        """Return the body, of which no more than MOST_BYTES are ever held."""
        request, body = Request(self._scope, self._receive), bytearray()
        too_large = ApiError(413, f"the body is larger than {MOST_BYTES} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > MOST_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(BODY_S), aclosing(request.stream()) as parts:
                async for part in parts:
                    body += part
                    if len(body) > MOST_BYTES:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {BODY_S:g} s") from None
        return bytes(body)

    async def _until_left(self, answering: Awaitable[None]) -> None:
        """Wait for an answer; raise ClientDisconnect if the client leaves before, and end the answer."""
        answer, left = asyncio.ensure_future(answering), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            await answer
        finally:
            for task in (answer, left):
                task.cancel()
            await asyncio.gather(answer, left, return_exceptions=True)

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _answer(self, loaded: Loaded, asked: Asked, size: int, arrival: float) -> None:
        model = loaded.model
        prompts = await self.server.prompts(model, asked, size)
        answer = model.answer(asked, prompts)
        told = self._scope["state"]["told"]
        told |= {"answer": answer.id, "tokens_in": sum(map(len, prompts))}
        params = model.params(asked, prompts)
        ttft_ms: dict[int, float] = {}  # of each choice
        async with aclosing(loaded.engine.stream_all(prompts, params, arrival)) as chunks:
            async for index, chunk in chunks:
                if index not in ttft_ms:
                    ttft_ms[index] = (time.perf_counter() - arrival) * 1e3
                    told.setdefault("ttft_ms", ttft_ms[index])
                if not asked.stream:
                    if chunk.output is not None:
                        answer.choices[index].take(chunk.output)
                elif (frame := answer.event(index, chunk)) is not None:
                    await self._part(frame)
        whole = None if asked.stream else json_response(answer.whole())
        told["tokens_out"] = sum(choice.tokens for choice in answer.choices)
        for index, choice in enumerate(answer.choices):
            if choice.output is not None:
                loaded.prometheus.count(choice.output, ttft_ms[index])
        if whole is None:
            await self._part((answer.last_event() or b"") + DONE, more=False)
        else:
            await self._respond(whole)

    async def _respond(self, response: Response) -> None:
        self._begun = True
        await response(self._scope, self._receive, self._send)

    async def _part(self, body: bytes, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "POST")
    what = {
        404: f"there is no {request.url.path[:200]} here",
        405: f"{request.method} is not for this path: use {allowed}",
    }
    return error_response(ApiError(error.status_code, what.get(error.status_code, error.detail)))


async def _fault(request: Request, error: Exception) -> Response:
    return error_response(_told(error))


def _told(error: Exception) -> ApiError:
    """Return what a client is told of a fault of this program."""
    return ApiError(500, f"a fault of the server: {type(error).__name__}")
